"""Power cuts, full disks, damaged files, Ctrl-C: no result is ever half-written, and --resume goes on to the bit."""

import csv
import json
import os
import random
import shutil
import signal
import threading
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

import tclip

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked here")
CLASSES = ["red", "green", "blue"]
KILLS = int(os.environ.get("TCLIP_KILLS", 6))  # how many moments of a run a power cut is tried at
EPOCHS = 5


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """(arguments of a small run with everything in it: images, some skipped, pseudo-labels, truth; their folder)."""
    root, rng = tmp_path_factory.mktemp("given"), np.random.default_rng(0)
    (root / "photos").mkdir()
    rows = [("file", "label", "confidence")]
    for i in range(90):
        pixels = rng.integers(0, 160, (12, 12, 3), np.uint8)
        pixels[..., i % 3] += 80
        Image.fromarray(pixels).save(root / "photos" / f"{i:02d}.png")
        rows.append((f"{i:02d}.png", CLASSES[(i + (i % 5 == 0)) % 3], "0.8"))
    (root / "photos" / "broken.png").write_bytes(b"broken")
    with open(root / "teacher.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    with open(root / "truth.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *((f"{i:02d}.png", CLASSES[i % 3]) for i in range(90))])
        csv.writer(file).writerow(("broken.png", "red"))
    arguments = ["--images", root / "photos", "--pseudo-labels", root / "teacher.csv", "--classes", ",".join(CLASSES)]
    arguments += ["--truth", root / "truth.csv", "--size", 8, "--arch", "resnet8", "--epochs", EPOCHS]
    return [*arguments, "--batch-size", 16, "--label-neighbours", 5, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(given, nursery, tmp_path_factory):
    """That run, never interrupted: (its folder, how many seconds it took)."""
    cwd, started = tmp_path_factory.mktemp("whole"), time.monotonic()
    child = nursery.tclip(*given, "--out", "run", cwd=cwd)
    assert child.wait() == 0, child.output
    return cwd / "run", time.monotonic() - started


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "run")


def check_whole(file):
    """What looks like a finished file is one, to its end."""
    if file.suffix == ".json":
        assert json.loads(file.read_text())
    elif file.suffix == ".csv":
        assert file.read_bytes().endswith(b"\r\n")
        with open(file, newline="", encoding="utf-8") as lines:
            header, *rows = csv.reader(lines)
        assert rows and {len(row) for row in rows} == {len(header)}
        assert file.name != "labels.csv" or len(rows) == 90
    elif file.suffix == ".pt":
        assert tclip.read_tensors(file)
    elif file.suffix == ".html":
        assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")
    elif file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
    else:
        assert file.suffix == ".part", f"{file.name}: of which nothing is known"


def same_results(run, whole):
    """Student and labels are bit for bit those of the uninterrupted run, and nothing is left over."""
    assert {file.name for file in run.iterdir()} == {file.name for file in whole.iterdir()}
    for name in ("model.pt", "labels.csv", "skipped.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    timeless = []
    for folder in (run, whole):
        with open(folder / "metrics.csv", newline="") as file:
            timeless.append([{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)])
    assert timeless[0] == timeless[1]


def go_on(given, nursery, cwd):
    """What a user does after a power cut: --resume, or the same command again where nothing had begun."""
    begun = (cwd / "run" / "config.json").exists()
    child = nursery.tclip(*(["--resume", "run"] if begun else [*given, "--out", "run"]), cwd=cwd)
    assert child.wait() == 0, child.output
    return begun


@pytest.mark.parametrize("moment", range(KILLS))
def test_power_cut(moment, given, whole, nursery, tmp_path):
    """SIGKILL at any moment from the start to the end: what lies there is whole, and the run goes on to the bit."""
    seconds = (moment + random.Random(moment).random()) / KILLS * whole[1]
    child = nursery.tclip(*given, "--out", "run", cwd=tmp_path)
    time.sleep(seconds)
    if not child.ended:
        child.send(signal.SIGKILL)
        child.wait()
    for file in (tmp_path / "run").glob("*"):
        check_whole(file)
    go_on(given, nursery, tmp_path)
    same_results(tmp_path / "run", whole[0])


CUT = """
import os, signal
replace, count = os.replace, 0
def cut(draft, path):
    global count
    count += os.path.basename(path) == {name!r}
    if count < {nth}:
        return replace(draft, path)
    if {after}:
        replace(draft, path)
    else:
        with open(draft, "rb+") as file:  # of the draft, half had reached the disk
            file.truncate(os.path.getsize(draft) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = cut
"""


@pytest.mark.parametrize(
    "name, nth, after",
    [("config.json", 1, False), ("config.json", 1, True), ("checkpoint.pt", 1, False), ("checkpoint.pt", 1, True)]
    + [("checkpoint.pt", EPOCHS, True)]
    + [("labels.csv", 1, False), ("model.pt", 1, False), ("summary.json", 1, False)],
)
def test_power_cut_while_a_file_is_written(name, nth, after, given, whole, nursery, tmp_path):
    """The moments that matter most, each for certain: just before and just after a file is put into place."""
    child = nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=CUT.format(name=name, nth=nth, after=after))
    assert child.wait() == -signal.SIGKILL, child.output
    assert (tmp_path / "run" / name).exists() == after
    for file in (tmp_path / "run").glob("*"):
        check_whole(file)
    assert go_on(given, nursery, tmp_path) == (name != "config.json" or after)
    same_results(tmp_path / "run", whole[0])


def test_power_cut_in_the_middle_of_training(given, whole, nursery, tmp_path):
    """In the third epoch: the resumed run does not begin anew."""
    cut = CUT.format(name="checkpoint.pt", nth=3, after=False)
    child = nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=cut)
    assert child.wait() == -signal.SIGKILL, child.output
    assert len(tclip.read_tensors(tmp_path / "run/checkpoint.pt")["history"]) == 2
    spy = "epoch = tclip.train_epoch\ntclip.train_epoch = lambda *a: print('an epoch', flush=True) or epoch(*a)"
    child = nursery.tclip("--resume", "run", cwd=tmp_path, before=spy)
    assert child.wait() == 0 and child.output.count("an epoch") == EPOCHS - 2, child.output
    same_results(tmp_path / "run", whole[0])


def test_power_cut_at_the_very_end(copy, whole, nursery, tmp_path):
    """Where only the last files are missing, they are written again from the checkpoint."""
    for name in ("labels.csv", "model.pt", "summary.json"):
        (copy / name).unlink()
    assert nursery.tclip("--resume", "run", cwd=tmp_path).wait() == 0
    same_results(copy, whole[0])


@pytest.mark.parametrize("limit", [100, 5000, 100_000, 2_000_000])
def test_full_disk(limit, given, whole, nursery, tmp_path):
    """A disk that is full after so many bytes of a file: one line, no half-written result; with room, it goes on."""
    pytest.importorskip("resource", reason="no limits of file sizes here")
    full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    child = nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=full)
    assert child.wait() == 2, child.output
    check_one_line(child.output, "cannot write", "run")
    for file in (tmp_path / "run").glob("*"):
        assert file.suffix != ".part"
        check_whole(file)
    go_on(given, nursery, tmp_path)
    same_results(tmp_path / "run", whole[0])


def check_one_line(output, *parts):
    """The answer is one line, that has these parts."""
    lines = [line for line in output.splitlines() if line.startswith("tclip: ") and "readable images" not in line]
    assert len(lines) == 1 and "Traceback" not in output, output
    assert all(part in lines[0] for part in parts), lines


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_cut_off_checkpoint(share, copy, whole, nursery, tmp_path):
    """A checkpoint that is cut off is named, with what to do; that done, the run goes on to the same end."""
    file = copy / "checkpoint.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    child = nursery.tclip("--resume", "run", cwd=tmp_path)
    assert child.wait() == 2
    check_one_line(child.output, "checkpoint.pt", "delete it")
    if share == 0.5:
        file.unlink()
        assert nursery.tclip("--resume", "run", cwd=tmp_path).wait() == 0
        same_results(copy, whole[0])


def test_flipped_bits(copy, nursery, tmp_path):
    """A bit flipped in what describes the checkpoint is told; never is there a traceback. (In the numbers themselves a
    flipped bit cannot be seen.)"""
    file = copy / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    start = content.index(b"history")  # within the description of the tensors
    for place in (0, 2, start - 40, start, start + 30, len(content) - 10, len(content) - 60):
        damaged = content.copy()
        damaged[place] ^= 0x10
        file.write_bytes(damaged)
        child = nursery.tclip("--resume", "run", cwd=tmp_path)
        code = child.wait()
        assert code in (0, 2) and "Traceback" not in child.output, (place, child.output)
        if code == 2:
            check_one_line(child.output, "checkpoint.pt")


@pytest.mark.parametrize("change", ["one more", "one less", "another name"])
def test_checkpoint_of_other_images(change, given, copy, nursery, tmp_path):
    """A run goes on with the images that it began with: where the folder holds others by now it is told, and the
    checkpoint stays."""
    before, photos = (copy / "checkpoint.pt").read_bytes(), given[1]
    first, other = photos / "00.png", photos / "00 other.png"
    shutil.copy(first, tmp_path / "kept.png")
    try:
        if change != "one less":
            shutil.copy(first, other)
        if change != "one more":
            first.unlink()
        child = nursery.tclip("--resume", "run", cwd=tmp_path)
        assert child.wait() == 2 and "checkpoint.pt is of another run" in child.output, child.output
    finally:
        other.unlink(missing_ok=True)
        shutil.copy(tmp_path / "kept.png", first)
    assert (copy / "checkpoint.pt").read_bytes() == before


def test_checkpoint_with_code_in_it(copy, nursery, tmp_path):
    """A run folder from elsewhere: code in its checkpoint is not run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save(dict(student=Bomb()), copy / "checkpoint.pt")
    child = nursery.tclip("--resume", "run", cwd=tmp_path)
    assert child.wait() == 2 and not (tmp_path / "exploded").exists()
    check_one_line(child.output, "checkpoint.pt")


SLOW = """
import time
work = tclip.{name}
def slow(*args, **keywords):
    print("begun", flush=True)
    time.sleep(0.05)
    return work(*args, **keywords)
tclip.{name} = slow
"""


def interrupted(child):
    """Ctrl-C as soon as the work has begun. Returns what was printed."""
    child.wait_until(lambda: "begun" in child.output)
    child.send(signal.SIGINT)
    return stopped(child)


def stopped(child):
    """Wait for the end of an interrupted process. Returns what was printed, which has no traceback."""
    assert child.wait() == 130, child.output
    assert "Traceback" not in child.output and "KeyboardInterrupt" not in child.output
    assert "tclip: stopped." in child.output
    return child.output


@pytest.mark.parametrize("name", ["upright_rgb", "train_epoch", "neighbour_mean", "score"])
def test_ctrl_c(name, given, whole, nursery, tmp_path):
    """While images are read, in training, between epochs, and at the end: exit code 130 and the command to go on with,
    which goes on to the same end."""
    output = interrupted(nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=SLOW.format(name=name)))
    assert "--resume run" in output
    for file in (tmp_path / "run").glob("*"):
        check_whole(file)
    assert go_on(given, nursery, tmp_path)
    same_results(tmp_path / "run", whole[0])


def test_ctrl_c_before_anything(given, nursery, tmp_path):
    """Before there is anything to go on with, no such command is told."""
    output = interrupted(nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=SLOW.format(name="listed")))
    assert "--resume" not in output


# Ctrl-C at the worst moment: as work is handed to a worker for the first time, and the lock of its queue is taken.
IN_A_LOCK = """
import os, signal, multiprocessing.queues
put = multiprocessing.queues.Queue.put
def interrupted(queue, *args):
    multiprocessing.queues.Queue.put = put
    queue._notempty.acquire()
    os.kill(os.getpid(), signal.SIGINT)
    queue._notempty.release()
    put(queue, *args)
multiprocessing.queues.Queue.put = interrupted
"""


@pytest.mark.parametrize("in_a_lock", [False, True])
def test_ctrl_c_with_workers(in_a_lock, given, nursery, tmp_path):
    """The same while many images are read by several processes, none of which prints a traceback or stays."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2001):
        (photos / f"{i:02d}.ppm").write_bytes(b"P6 1 1 255\n123")
    (tmp_path / "teacher.csv").write_text("file,label\n00.ppm,a\n01.ppm,b\n")
    arguments = ("--images", "photos", "--pseudo-labels", "teacher.csv", "--out", "run", *given[8:])
    before = "import os; os.sched_getaffinity = lambda process: {0, 1}\n"
    before += IN_A_LOCK if in_a_lock else SLOW.format(name="upright_rgb")
    child = nursery.tclip(*arguments, cwd=tmp_path, before=before)
    if in_a_lock:
        assert "--resume run" in stopped(child)
    else:
        assert "--resume run" in interrupted(child)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)  # is anyone of its group still there?
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a worker has stayed")


@pytest.mark.parametrize("presses", [0, 1, 2])
def test_interrupts_held(presses):
    """Ctrl-C counts at the end of the block; pressed again, at once. After it, Ctrl-C is what it was."""
    done = []
    with pytest.raises(KeyboardInterrupt) if presses else nullcontext():
        with tclip.interrupts_held():
            for press in range(presses):
                signal.raise_signal(signal.SIGINT)
                done.append(press)
            done.append("end")
    assert done == [["end"], [0, "end"], [0]][presses]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_are_left_alone():
    """A program that has another use for Ctrl-C keeps it, and a thread may read images as well. An error in the block
    puts Ctrl-C back, too."""
    heard = []
    usual = signal.signal(signal.SIGINT, lambda *args: heard.append("Ctrl-C"))
    try:
        with tclip.interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert heard == ["Ctrl-C"]
    finally:
        signal.signal(signal.SIGINT, usual)

    def work():
        with tclip.interrupts_held():
            heard.append("thread")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == ["Ctrl-C", "thread"]
    with pytest.raises(ValueError), tclip.interrupts_held():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
