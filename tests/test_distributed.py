"""Two processes under torchrun, on the CPU: they train the student that one process trains.

Run by torchrun, this file is what the processes do; run by pytest, it compares what they found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import coloured, settings
from torch import nn

import tclip
from tclip import Images, Student, train

DIGITS = dict(size=16, arch="resnet8", views="writing", clip="offline", class_prior="uniform", device="cpu", epochs=3)


def train_plainly():
    """Three steps, of all 18 images each, of a student without BatchNorm; the second view of an image is its mirror."""

    def plain(*args):
        student = Student(*args)
        for module in list(student.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    setattr(module, name, nn.Identity())
        return student

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip, "Student", plain)
        patch.setattr(tclip, "has_fast_bfloat16", lambda device: False)  # the tolerances below are float32's
        patch.setattr(tclip, "augment", lambda pixels, **_: torch.cat([pixels, pixels.flip(3)]) / 255)
        student, labels = train(settings(epochs=3, batch_size=18, lr=2.0), *coloured(18))
    return dict(student=student.state_dict(), table=labels.table)


def work():
    """What each process does; its findings go to a file of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: None)  # we go on with the group
        _, summary = tclip.run(tclip.Config(**DIGITS, out="two"))
    seen, found = [], dict(plain=train_plainly(), summary=json.dumps(summary))

    def objective(logits, z, index, labels, config):
        seen.append(index)
        return tclip.tclip_objective(logits, z, index, labels, config)

    class Shaky(tclip.EnsembleLabels):
        def end_epoch(self):
            super().end_epoch()
            self.table += 0.01 * dist.get_rank()  # much as sums on two GPUs differ

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip, "EnsembleLabels", Shaky)
        student, labels = train(settings(), *coloured(37), objective=objective)  # an odd number
    weights = dict(student.named_parameters())  # not statistics of BatchNorm, which are each process's own
    torch.save(found | dict(odd=dict(weights, table=labels.table, seen=torch.cat(seen))), f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


def fail():
    """Both processes find that the loss is not finite."""
    images = Images(None, *coloured()[:1], None, *coloured()[1:])
    tclip.run(settings(lr=1e3, weight_decay=1.0, epochs=40, out="failed"), lambda config: (images, None, list("abc")))


if __name__ == "__main__":
    {"work": work, "fail": fail}[sys.argv[1]]()
    sys.exit()


def torchrun(what, cwd):
    """Run work() or fail() by two processes. Returns the exit code and what both streams said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, what]
    environment = os.environ | dict(PYTHONPATH=str(Path(tclip.__file__).parent), OMP_NUM_THREADS="1")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=cwd, env=environment, timeout=300, **streams)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes found, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    code, said = torchrun("work", folder)
    assert code == 0, said
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)], said, folder


def test_gradient(found):
    """Three steps of two processes, each with half of the batch, are those of one process with all of it: cross-
    entropy, contrastive loss over the whole batch, momentum, and the labels that follow."""
    whole = train_plainly()
    torch.manual_seed(0)
    begin = Student("resnet8", 3, 8).classifier.weight
    assert (whole["student"]["classifier.weight"] - begin).abs().max() > 1e-3  # there was something to do
    for process in found[0]:
        torch.testing.assert_close(process["plain"]["student"], whole["student"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(process["plain"]["table"], whole["table"], rtol=0, atol=1e-3)


def test_processes_are_one(found):
    """All have the same weights and the same labels at the end, to the bit, of an odd number of images as well: in each
    epoch one image, another each time, is left out, and no other is seen twice."""
    first, second = (process["odd"] for process in found[0])
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for epoch in first["seen"].chunk(4):
        assert len(epoch.unique()) == len(epoch) == 36
    assert len(first["seen"].unique()) == 37


def test_digits(found):
    """A whole run on the digits ends as right as by one process, within what another seed may do; the results are
    written once, and no warning reaches the user."""
    processes, said, folder = found
    first, second = (json.loads(process["summary"]) for process in processes)
    _, alone = tclip.run(tclip.Config(**DIGITS, out=str(folder / "one")))
    assert second is None and first["images"] == alone["images"] == 1437
    for key in ("unlabeled_student_accuracy", "heldout_student_accuracy", "unlabeled_label_accuracy"):
        assert first[key] == pytest.approx(alone[key], abs=0.04)
    assert {file.name for file in (folder / "two").iterdir()} == {file.name for file in (folder / "one").iterdir()}
    assert "warn" not in said.lower(), said


def test_mistake(tmp_path):
    """What all processes see is told once."""
    code, said = torchrun("fail", tmp_path)
    assert code != 0 and said.count("tclip: the loss is not finite") == 1, said
