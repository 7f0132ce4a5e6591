"""Several processes under torchrun, on the CPU: they train the student that one process trains on all of the images.

Run by torchrun, this file is what the processes do; run by pytest, it compares what they found.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tclip
from tclip import Config, EnsembleLabels, Images, Student, complete, neighbour_mean, train

SCRIPT = Path(tclip.__file__).resolve()
CLASSES = ["red", "green", "blue"]
W, N = 2, 37  # N is no multiple of W. (With three ranks or more, the order of sums has a say in the last bit.)
EQUAL = 18  # images that fill one batch, with as many for each rank


# What the processes and the test have in common: all images; `own` are the rows of one rank


def coloured(n, own=slice(None)):
    """Noise, a little brighter in the channel of its class, and what the teacher says, mostly right."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 160, (n, 3, 8, 8), generator=generator)
    logits = torch.randn(n, 3, generator=generator)
    for i in range(n):
        pixels[i, i % 3] += 80
        logits[i, i % 3] += 2
    return Images(pixels.byte()[own], [str(i) for i in range(n)][own], CLASSES), logits.softmax(1)[own]


def settings(**changes):
    values = dict(size=8, epochs=4, batch_size=18, label_neighbours=3, device="cpu", out="unused")
    return complete(Config(**(values | changes)))


def train_plainly(own=slice(None)):
    """Three steps, of all images each, of a student without BatchNorm; the second view of an image is its mirror."""

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
        student, labels = train(settings(epochs=3, batch_size=EQUAL, lr=2.0), *coloured(EQUAL, own))
    return dict(student=student.state_dict(), table=labels.table, trust=labels.trust)


def follow(own=slice(None)):
    """Labels of 51 images, of which one, in the first epoch, is not seen, and one twice."""
    generator = torch.Generator().manual_seed(0)
    start, *said = torch.randn(4, 51, 4, generator=generator).mul(3).softmax(-1)
    places = F.normalize(torch.randn(51, 6, generator=generator), dim=1)
    labels = EnsembleLabels(start[own], momentum=0.5, neighbours=4)
    mine = torch.arange(51)[own]
    for epoch, probs in enumerate(said):
        index = [i for i in range(len(mine)) for _ in range({7: 0, 8: 2}.get(int(mine[i]), 1) if epoch == 0 else 1)]
        labels.record(torch.tensor(index), probs[mine[index]], places[mine[index]])
        labels.end_epoch()
    return dict(start=labels.start, table=labels.table, trust=labels.trust)


def places():
    return F.normalize(torch.randn(50, 5, generator=torch.Generator().manual_seed(1)), dim=1)


def work(folder):
    """What each process does; its results go to a file of its own."""

    def stop(row, student, labels):
        if row["epoch"] == 3:
            raise InterruptedError

    with tclip.joined_ranks(torch.device("cpu")):
        own = slice(tclip.rank(), None, tclip.ranks())
        found = dict(plain=train_plainly(own), followed=follow(own))
        found["near"] = neighbour_mean(places()[own], torch.eye(50)[own], 3, pool=12)
        student, labels = train(settings(), *coloured(N, own), folder / "whole")
        found["whole"] = dict(student=student.state_dict(), table=labels.table)
        try:
            train(settings(), *coloured(N, own), folder / "cut", stop)
        except InterruptedError:
            pass
        if tclip.rank() == 0:
            shutil.copytree(folder / "cut", folder / "handed over")
        student, labels = train(settings(), *coloured(N, own), folder / "cut")
        found["resumed"] = dict(student=student.state_dict(), table=labels.table)
        torch.save(found, folder / f"{tclip.rank()}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    sys.exit()


def torchrun(processes, *command, cwd):
    """torchrun with so many processes, as a process that has just begun; both its streams go to the file `log`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | dict(PYTHONPATH=str(SCRIPT.parent))
    with open(cwd / "log", "w") as log:
        return subprocess.Popen([*launcher, *map(str, command)], cwd=cwd, env=environment, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(What each of the processes found, their folder.)"""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("whole", "cut"):
        (folder / name).mkdir()
    assert torchrun(W, __file__, folder, cwd=folder).wait(timeout=300) == 0, (folder / "log").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(W)], folder


def joined(parts):
    """Rows of all ranks in the order of the images: rank r has the rows r, r + W, ..."""
    rows = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
    for r, part in enumerate(parts):
        rows[r::W] = part
    return rows


def test_gradient(found):
    """Three steps of two processes, each with half of the batch, are those of one process with all of it: cross-
    entropy, contrastive loss over the whole batch, momentum, and the labels that follow."""
    whole = train_plainly()
    torch.manual_seed(0)
    begin = Student("resnet8", 3, 8).classifier.weight
    assert (whole["student"]["classifier.weight"] - begin).abs().max() > 1e-3  # there was something to do
    for rank in found[0]:
        torch.testing.assert_close(rank["plain"]["student"], whole["student"], rtol=1e-4, atol=1e-6)
        assert rank["plain"]["trust"] == pytest.approx(whole["trust"], abs=1e-4)
    table = joined([rank["plain"]["table"] for rank in found[0]])
    torch.testing.assert_close(table, whole["table"], rtol=0, atol=1e-3)


def test_labels(found):
    """Balance, neighbours and trust look at the images of all ranks, whose numbers differ."""
    whole = follow()
    for key in ("start", "table"):
        torch.testing.assert_close(joined([rank["followed"][key] for rank in found[0]]), whole[key], rtol=0, atol=1e-3)
    assert [rank["followed"]["trust"] for rank in found[0]] == [pytest.approx(whole["trust"], abs=1e-4)] * W


def test_neighbours(found):
    """The pool has its 12 images from all ranks, and everybody's neighbours are the nearest of these."""
    near = joined([rank["near"] for rank in found[0]])  # row i: 1/3 at each neighbour of i
    members = near.sum(0).nonzero().flatten()
    assert (members % W).bincount().tolist() == [6, 6]
    cosines = places() @ places()[members].T
    expected = F.one_hot(members[cosines.topk(3).indices], 50).sum(1) / 3
    torch.testing.assert_close(near, expected)


def test_students_are_one(found):
    """At the end all ranks have the same student, to the bit, with the same running statistics."""
    for rank in found[0][1:]:
        torch.testing.assert_close(rank["whole"]["student"], found[0][0]["whole"]["student"], rtol=0, atol=0)


def test_resumed(found):
    """A run that stopped, begun again, ends as if it had not: student and labels of each rank, to the bit."""
    for rank in found[0]:
        torch.testing.assert_close(rank["resumed"], rank["whole"], rtol=0, atol=0)


def test_handed_over(found):
    """One process goes on where two have stopped, each image with its label."""
    epochs, begin = [], tclip.read_tensors(found[1] / "handed over" / "checkpoint.pt")
    images, probs = coloured(N)
    assert sorted(begin["names"]) == sorted(images.names) and begin["names"] != images.names
    on_epoch = lambda row, *_: epochs.append(row["epoch"])  # noqa: E731
    _, labels = train(settings(), images, probs, found[1] / "handed over", on_epoch)
    assert epochs == [3, 4]
    torch.testing.assert_close(labels.start, EnsembleLabels(probs).start, rtol=0, atol=1e-3)


def test_shares(monkeypatch):
    """Each image is read by one process; where every second file is no image, as .json beside .jpg, each has some."""
    monkeypatch.setattr(tclip, "ranks", lambda: W)
    files, shares = [f"{i:02d}.{end}" for i in range(20) for end in ("jpg", "json")], []
    for rank in range(W):
        monkeypatch.setattr(tclip, "rank", lambda rank=rank: rank)
        share = tclip.share_of(len(files))
        assert share == sorted(share)
        shares.append([files[i] for i in share])
    assert sorted(sum(shares, [])) == files and {len(share) for share in shares} == {20}
    assert all(5 < sum(name.endswith(".jpg") for name in share) < 15 for share in shares)
    monkeypatch.undo()
    assert tclip.share_of(7) == list(range(7))


# The command line


@pytest.fixture
def photos(tmp_path):
    """The arguments of a small run on a folder of 41 images of three colours, of which the second is broken: of three
    processes, one has an image less than the others."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    rows = [("file", "label")]
    for i in range(41):
        pixels = rng.integers(0, 160, (9, 9, 3), np.uint8)
        pixels[..., i % 3] += 80
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02d}.png")
        rows.append((f"{i:02d}.png", CLASSES[(i + (i % 5 == 0)) % 3]))
    (tmp_path / "photos/01.png").write_bytes(b"broken")
    del rows[2]
    with open(tmp_path / "teacher.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with open(tmp_path / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *((f"{i:02d}.png", CLASSES[i % 3]) for i in range(41))])
    given = ["--images", "photos", "--pseudo-labels", "teacher.csv", "--classes", ",".join(CLASSES)]
    given += ["--truth", "truth.csv", "--size", 8, "--arch", "resnet8", "--batch-size", 16, "--device", "cpu"]
    return [*given, "--out", "run"]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def check_one_line(log):
    """All processes together say one line, and none shows where in tclip.py it was. Returns the line."""
    (line,) = [line for line in log.splitlines() if line.startswith("tclip: ")]
    assert 'tclip.py", line' not in log, log
    return line


def test_command(photos, tmp_path):
    """Ctrl-C, and on with --resume by one process more: results are of all images, in order, each with its label."""
    process = torchrun(2, SCRIPT, *photos, "--epochs", 20, cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) != 0
    log = (tmp_path / "log").read_text()
    log = log.replace("tclip: 1 of 41 files are no readable images: see run/skipped.csv\n", "", 1)
    assert check_one_line(log).startswith("tclip: stopped.") and not (tmp_path / "run/labels.csv").exists()

    assert torchrun(3, SCRIPT, "--resume", "run", cwd=tmp_path).wait(timeout=300) == 0, (tmp_path / "log").read_text()
    names = [f"{i:02d}.png" for i in range(41) if i != 1]
    said = {row["file"]: row["label"] for row in rows_of(tmp_path / "teacher.csv")}
    rows = rows_of(tmp_path / "run/labels.csv")
    assert [row["file"] for row in rows] == names
    assert [row["teacher_label"] for row in rows] == [said[name] for name in names]
    assert sum(row["label"] == CLASSES[int(row["file"][:2]) % 3] for row in rows) >= 28
    assert [row["file"] for row in rows_of(tmp_path / "run/skipped.csv")] == ["01.png"]
    assert [row["epoch"] for row in rows_of(tmp_path / "run/metrics.csv")] == [str(i + 1) for i in range(20)]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["images"] == 40 and summary["skipped"] == 1 and summary["device"] == "3 x cpu"
    truth = [CLASSES[i % 3] for i in range(41) if i != 1]
    assert summary["teacher_accuracy"] == pytest.approx(np.mean([said[n] == t for n, t in zip(names, truth)]))
    student, _ = tclip.load_student(tmp_path / "run/model.pt")
    pixels = torch.stack([tclip.square(Image.open(tmp_path / "photos" / name), 8) for name in names])
    right = [CLASSES[c] == t for c, t in zip(tclip.predict(student, pixels).argmax(1), truth)]
    assert summary["transductive_accuracy"] == pytest.approx(np.mean(right), abs=0.03)
    if (SCRIPT.parent / "tclip_report.py").exists():
        assert "data:image/png" in (tmp_path / "run/report.html").read_text()


def test_mistake(photos, tmp_path):
    """What one process alone has seen ends all of them, and is told once."""
    assert torchrun(2, SCRIPT, *photos, "--strict", cwd=tmp_path).wait(timeout=300) != 0
    log = (tmp_path / "log").read_text()
    assert "01.png" in check_one_line(log) and "exitcode  : 2" in log
