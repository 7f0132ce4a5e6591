"""The benchmark of speed: its file is complete and adds up, and its loops do the same work."""

import statistics
import sys

import pytest
import torch
from conftest import ROOT, rows_of

import tclip

sys.path.insert(0, str(ROOT / "tutorials/benchmark"))
speed = pytest.importorskip("speed")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run of all but CLIP: the rows of its file, and every batch that a student saw."""
    path, batches, forward = tmp_path_factory.mktemp("speed") / "speed.csv", [], tclip.Student.forward

    def spy(student, x):
        batches.append((sum(p.numel() for p in student.parameters()), x))
        return forward(student, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip.Student, "forward", spy)
        speed.main(["--quick", "--device", "cpu", "--only", "step", "start", "labels", "--out", str(path)])
    return rows_of(path), batches


def test_rows(quick):
    """Every section has rows of their own; median, lowest and highest are those of the runs; ratios are quotients; and
    all loops train networks of one size on batches of one shape, as often."""
    rows, batches = quick
    assert len({parameters for parameters, _ in batches}) == 1 and len(batches) == 2 * 2 * 3  # rounds, steps, loops
    assert {tuple(x.shape) for _, x in batches} == {(16, 3, 16, 16)}  # 8 images, two views
    assert all(0 <= x.min() and x.max() <= 1 for _, x in batches)
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["step", "start", "labels"]
    assert len({(row["section"], row["case"], row["figure"]) for row in rows}) == len(rows)
    for row in rows:
        row["runs"] = [float(value) for value in row["runs"].split()]
        median, low, high = (float(row[name]) for name in ("median", "low", "high"))
        expected = statistics.median(row["runs"]), min(row["runs"]), max(row["runs"])
        assert (median, low, high) == pytest.approx(expected, rel=1e-4) and (low > 0 or row["unit"] == "MB")
        assert row["device"].startswith("cpu") and row["torch"] == torch.__version__
    figures = {row["figure"]: row["runs"] for row in rows}
    for other in ("bare", "loader"):
        expected = [x / y for x, y in zip(figures["train"], figures[other])]
        assert figures[f"train / {other}"] == pytest.approx(expected, rel=1e-4)


def test_in_turn(monkeypatch):
    """The epochs of train() after the first are measured, and each other loop once after each."""
    calls, ticks = [], iter(range(100))

    def train(config, pixels, probs, on_epoch):
        for epoch in range(config.epochs):
            calls.append("train")
            on_epoch(dict(epoch=epoch + 1), None, None)

    monkeypatch.setattr(speed, "now", lambda device: next(ticks))
    monkeypatch.setattr(tclip, "train", train)
    others = dict(other=lambda: calls.append("other") or len(calls))
    views = speed.in_turn(tclip.Config(batch_size=5), torch.device("cpu"), 2, 3, others)
    assert calls == ["train", "other"] * 4 and views == dict(train=[20, 20, 20], other=[20 / 4, 20 / 6, 20 / 8])
