"""The benchmark of speed: its file is complete and adds up, its loops do the same work. No step waits for a GPU."""

import csv
import statistics
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tclip

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tutorials"))
speed = pytest.importorskip("speed")

SECTIONS = "step", "teacher", "decode", "growth"


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs(row):
    return [float(value) for value in row["runs"].split()]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run of what needs no other process: the rows of its csv file, and every batch that a student saw."""
    path, batches, forward = tmp_path_factory.mktemp("speed") / "speed.csv", [], tclip.Student.forward

    def spy(student, x):
        batches.append((sum(p.numel() for p in student.parameters()), x))
        return forward(student, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip.Student, "forward", spy)
        assert speed.main(["--quick", "--device", "cpu", "--only", ",".join(SECTIONS), "--out", str(path)]) == 0
    return rows_of(path), batches


def test_complete(quick):
    """Every section has its rows, each with a case, a figure, the machine, and as many runs as rounds."""
    rows, _ = quick
    assert list(dict.fromkeys(row["section"] for row in rows)) == list(SECTIONS)
    for row in rows:
        assert row["case"] and row["figure"] and len(runs(row)) == 2, row
        assert row["device"] and row["torch"] == torch.__version__ and int(row["threads"]) == torch.get_num_threads()
    assert len({(row["section"], row["case"], row["figure"]) for row in rows}) == len(rows)


def test_statistics(quick):
    """Median, lowest and highest are those of the runs, and all figures are above zero (memory: not below)."""
    for row in quick[0]:
        values = runs(row)
        median, low, high = (float(row[name]) for name in ("median", "low", "high"))
        assert (median, low, high) == (statistics.median(values), min(values), max(values))
        assert low >= 0 if "bytes" in row["unit"] else low > 0, row


def test_ratios(quick):
    """A ratio is the quotient of two figures, round by round."""
    figures = {row["figure"]: runs(row) for row in quick[0] if row["section"] in ("step", "teacher")}
    quotients = {
        "b / a": (speed.B, speed.A),
        "b / c": (speed.B, speed.C),
        "b / c, our layout": (speed.B, f"{speed.C}, our layout"),
        "augmentation, share of b": (speed.B, "augmentation"),
        "ours / open_clip's": ("prepare, encode", "open_clip's both"),
    }
    for ratio, (above, below) in quotients.items():
        assert figures[ratio] == [x / y for x, y in zip(figures[above], figures[below])], ratio


def test_same_work(quick):
    """All loops train networks of one size on batches of one shape, the real one as well, and as often."""
    _, batches = quick
    assert len({parameters for parameters, _ in batches}) == 1
    assert {tuple(x.shape) for _, x in batches} == {(16, 3, 16, 16)}  # 8 images, two views
    rounds, steps, loops = 1 + 2, 2, 5  # the first round warms up; train(), a and c, these two in two layouts
    assert len(batches) == rounds * steps * loops
    assert all(0 <= x.min() and x.max() <= 1 for _, x in batches)


def test_usual_loop():
    """The data set of loop c gives two different views of its image, whatever kind of images it is."""
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for dataset, _, _ in speed.CASES.values():
        config = tclip.complete(tclip.Config(dataset, size=32, out="nowhere"))
        first, second, index = speed.TwoViews(pixels, speed.usual_transforms(config))[1]
        assert first.shape == second.shape == (3, 32, 32) and index == 1
        assert not torch.equal(first, second) and first.min() >= 0 and first.max() <= 1


def test_warm_up_does_not_count(monkeypatch):
    """in_turn() measures the epochs of train() after the first, and each other loop once after each."""
    calls, ticks = [], iter(range(100))
    monkeypatch.setattr(speed, "now", lambda device: next(ticks))

    def train(config, images, probs, on_epoch):
        for epoch in range(config.epochs):
            calls.append("train")
            on_epoch(dict(epoch=epoch + 1), None, None)

    def other():
        calls.append("other")
        return len(calls)

    monkeypatch.setattr(tclip, "train", train)
    seconds = speed.in_turn(tclip.Config(), None, None, dict(other=other), 3, torch.device("cpu"))
    assert calls == ["train", "other"] * 4
    assert seconds == {speed.B: [1, 1, 1], "other": [4, 6, 8]}


def test_call():
    """Seconds and memory of a command are its own; what fails is told in one line."""
    small, large = (speed.call(sys.executable, "-c", f"x = b'1' * {n}")[1] for n in (1000, 300_000_000))
    assert small < 50 and 290 < large - small < 310
    assert speed.call(sys.executable, "-c", "import time; time.sleep(0.5)")[0] > 0.5
    with pytest.raises(tclip.UserError, match="-c raise SystemExit.*: what is wrong$"):
        speed.call(sys.executable, "-c", "raise SystemExit('what is wrong')")


def test_commands(tmp_path):
    """The sections that start processes of their own."""
    path = tmp_path / "speed.csv"
    assert speed.main(["--quick", "--rounds", "1", "--only", "start,memory,devices", "--out", str(path)]) == 0
    figures = {row["figure"]: float(row["median"]) for row in rows_of(path)}
    assert set(figures) == {"import torch", "import tclip, beyond torch", "peak memory", "training"}
    assert all(figures.values())


def test_other_rows_stay(tmp_path):
    """A section measured anew replaces its rows for this device; those of other devices and sections stay."""
    path = tmp_path / "speed.csv"
    rows = [dict(section=s, device=d, median=str(i)) for i, (s, d) in enumerate((s, d) for s in "xy" for d in "pq")]
    tclip.write_csv(path, rows)
    speed.keep(path, "y", [dict(section="y", device="p", median="new")])
    assert [row["median"] for row in rows_of(path)] == ["0", "1", "3", "new"]


def test_table():
    """Markdown that can be pasted: the longer list downwards, a blank where a case has no such figure."""
    rows = [dict(case="x", figure="f", unit="s", low=1, median=2.5, high=3000)]
    rows += [dict(case=case, figure="g", unit="", low=1, median=1, high=1) for case in "yz"]
    lines = ["|  | f, s | g |", "| --- | --- | --- |", "| x | 2.50 (1.00 to 3,000) |  |", "| y |  | 1.00 |"]
    assert speed.table(rows).splitlines() == lines + ["| z |  | 1.00 |"]


@pytest.mark.parametrize("arguments", [["--only", "steps"], ["--rounds", "0"]])
def test_wrong_arguments(arguments, capsys):
    """One line, and exit code 2."""
    assert speed.main(arguments) == 2
    assert capsys.readouterr().err.startswith("speed: ")


class Waits(TorchDispatchMode):
    """Counts the operations for which a GPU would be waited for: those whose result Python sees or sizes hang on."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.split(".")[0]
        masked = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += masked or name in self.names
        return operation(*args, **(kwargs or {}))


def training(steps, device):
    """Train for one epoch of so many steps."""
    config = tclip.complete(
        tclip.Config(size=8, epochs=1, batch_size=4, label_neighbours=2, device=device, out="nowhere")
    )
    pixels = torch.randint(0, 256, (4 * steps, 3, 8, 8), dtype=torch.uint8)
    images = tclip.Images(pixels, [str(i) for i in range(4 * steps)], ["x", "y"])
    tclip.train(config, images, torch.rand(4 * steps, 2).softmax(1))


def test_no_step_waits(monkeypatch):
    """The operations that would wait for a GPU are as many in an epoch of six steps as in one of two."""
    counts, tolist = [], torch.Tensor.tolist

    for steps in (2, 6):
        with Waits() as waits:

            def spy(tensor, waits=waits):
                waits.count += 1
                return tolist(tensor)

            monkeypatch.setattr(torch.Tensor, "tolist", spy)
            training(steps, "cpu")
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_no_step_waits_for_cuda():
    """The same by what PyTorch says on a GPU. It warns at each wait."""
    counts = []
    for steps in (2, 2, 6):  # the first time the device warms up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training(steps, "cuda")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[1] == counts[2]
