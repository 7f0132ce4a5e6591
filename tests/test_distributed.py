"""Two processes under torchrun, on the CPU: they train the student that one process trains.

Run by torchrun, this file is what the processes do; run by pytest, it compares what they found.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import coloured, settings
from torch import nn

import tclip
from tclip import Student, train


def train_plainly():
    """Three steps, of all 18 images each, by BatchNorm's first statistics; an image's second view is its mirror."""

    def plain(norm, x):
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.modules.batchnorm._BatchNorm, "forward", plain)
        patch.setattr(tclip, "has_fast_bfloat16", lambda device: False)  # the tolerances below are float32's
        patch.setattr(tclip, "augment", lambda pixels, **_: torch.cat([pixels, pixels.flip(3)]) / 255)
        student, labels = train(settings(epochs=3, batch_size=18, lr=2.0), *coloured(18))
    return dict(student=student.state_dict(), table=labels.table)


def work():
    """What each process does; its findings go to a file of its own."""
    dist.init_process_group("gloo")
    seen, said, plain = [], [], train_plainly()

    def objective(logits, z, index, labels, config):
        seen.append(index)
        said.append(labels.targets(index))
        return tclip.tclip_objective(logits, z, index, labels, config)

    class Shaky(tclip.EnsembleLabels):
        def end_epoch(self):
            super().end_epoch()
            self.table += 0.01 * dist.get_rank()  # much as sums on two GPUs differ

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip, "EnsembleLabels", Shaky)
        student, _ = train(settings(), *coloured(37), objective=objective)  # an odd number
    weights = dict(student.named_parameters())  # not statistics of BatchNorm, which are each process's own
    odd = dict(weights, said=torch.cat(said), seen=torch.cat(seen))
    torch.save(dict(plain=plain, odd=odd), f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(work())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = os.environ | dict(PYTHONPATH=str(Path(tclip.__file__).parent), OMP_NUM_THREADS="1")
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(command, cwd=folder, env=environment, timeout=300, **streams)
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_gradient(found):
    """Three steps of two processes, each with half of the batch, are those of one process with all of it: cross-
    entropy, contrastive loss over the whole batch, momentum, and the labels that follow."""
    whole = train_plainly()
    torch.manual_seed(0)
    begin = Student("resnet8", 3, 8).classifier.weight
    assert (whole["student"]["classifier.weight"] - begin).abs().max() > 1e-3  # there was something to do
    for process in found:
        torch.testing.assert_close(process["plain"]["student"], whole["student"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(process["plain"]["table"], whole["table"], rtol=0, atol=1e-3)


def test_processes_are_one(found):
    """All have the same labels in each step and the same weights at the end, to the bit, of an odd number of images as
    well: in each epoch one image, another each time, is left out, and no other is seen twice."""
    first, second = (process["odd"] for process in found)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for epoch in first["seen"].chunk(4):
        assert len(epoch.unique()) == len(epoch) == 36
    assert len(first["seen"].unique()) == 37
