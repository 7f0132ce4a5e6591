"""Everything that is to be measured on a GPU, the most valuable first, in the minutes that one has.

    python tutorials/benchmark/gpu.py --root data --pack packed    # before: the data it needs, at most 55 MiB
    python tutorials/benchmark/gpu.py --root packed --minutes 9    # on the GPU; nothing is downloaded
    python tutorials/benchmark/gpu.py --root data --dry            # all parts, toy size, on a CPU: figures mean nothing

Each part is a process with a time limit of its own. What is measured is printed and written to the folder --results at
once (gpu.csv, and the csv files of run.py); the same command goes on with what is missing there. --only takes parts by
name.
"""

import argparse
import csv
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # tclip.py of this checkout, and what lies beside this file
import run
import speed
import suites
import torch

import tclip

MIB = 2**20
# compiled: bfloat16 with --compile, which takes a minute to begin. float32: TF32 in convolutions, PyTorch's default
WAYS = "bfloat16", "float32", "compiled"


def results_of(suite, *options):
    """A part: run.py at full size, one seed at least, with these options."""

    def part(given):
        size = ["--images", "60", "--epochs", "1"] if given.dry else ["--full"]
        run.main(["--suite", suite, "--root", given.root, "--results", str(given.results), *options, *size])

    return part


def measured(given, section, figures):
    """Print the rows of one section and keep them in gpu.csv. figures: function -> (case, figure, unit, runs) each."""
    path = given.results / "gpu.csv"
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            if any(row["section"] == section for row in csv.DictReader(file)):
                return
    device = torch.device(given.device)
    rows = [speed.figure_row(section, *figure, device) for figure in figures(device)]
    speed.keep(path, section, rows)
    print(f"\n{section}, {rows[0]['device']}\n\n{speed.table(rows)}", flush=True)


@contextmanager
def computing(way):
    """Within it, float32 is kept to where that is the way."""
    fast = tclip.has_fast_bfloat16
    tclip.has_fast_bfloat16 = (lambda device: False) if way == "float32" else fast
    yield
    tclip.has_fast_bfloat16 = fast


def training_speed(given, size):
    """A part: tclip.train() in three ways beside the bare step and the DataLoader loop, ResNet-18 at `size` px."""
    rounds, steps = (1, 2) if given.dry else (3, 30)

    def figures(device, way, batch):
        config = tclip.Config(arch="resnet8" if given.dry else "resnet18", size=size, batch_size=batch)
        config = replace(config, compile=way == "compiled")
        others = dict(bare=speed.bare(config, device, steps))
        if way == "bfloat16":
            others |= dict(loader=speed.usual(config, device, steps, 0 if given.dry else 16))
        with computing(way):
            speeds = speed.in_turn(config, device, steps, rounds, others)
        yield from speed.compared(way, speeds)
        if device.type == "cuda":
            yield way, "peak memory", "MB", [torch.cuda.max_memory_allocated() / 1e6]

    for way in WAYS[: 2 if given.dry else 3]:
        for batch in (4,) if given.dry else (128, 512):
            measured(given, f"train, {size} px, batch {batch}, {way}", partial(figures, way=way, batch=batch))


def profile(given):
    """A part: what the steps of train() are spent on: the kernels to profile.txt, and how many are launched."""
    steps, batch = (2, 4) if given.dry else (20, 128)

    def figures(device):
        arch = "resnet8" if given.dry else "resnet18"
        config = tclip.Config(arch=arch, batch_size=batch, epochs=1, device=given.device)
        data = speed.noise(steps * batch, 32), torch.rand(steps * batch, 10).softmax(1)
        tclip.train(config, *data)  # warms up
        with torch.profiler.profile() as profiler:
            seconds = speed.seconds_of(lambda: tclip.train(config, *data), device)
        events = profiler.key_averages()
        (given.results / "profile.txt").write_text(events.table(sort_by="self_device_time_total", row_limit=40))
        launches = sum(event.count for event in events if "LaunchKernel" in event.key)
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels if not event.is_user_annotation) / 1e6
        yield "train() of batches of 128", "kernel launches", "a step", [launches / steps]
        yield "train() of batches of 128", "GPU busy", "of the time", [busy / seconds]

    measured(given, "profile", figures)


def labels(given):
    """A part: end_epoch() of 50,000 images."""

    def figures(device):
        seconds, taken = zip(*(speed.end_epoch(device, 200 if given.dry else 50_000) for _ in range(3)))
        yield "50,000 images, 10 classes", "end_epoch", "s", seconds
        yield "50,000 images, 10 classes", "takes beside", "MB", [x / 1e6 for x in taken]

    measured(given, "labels", figures)


def clip(given):
    """A part: images a second through CLIP."""
    measured(given, "clip", partial(speed.clip, rounds=1 if given.dry else 3, quick=given.dry))


def precision(given):
    """A part: does the way of computing change what is learned? 10,000 images with ten votes, 40 epochs each."""

    def figures(device, way):
        suite = suites.SUITES["cifar10-votes"]
        settings = suite.settings if given.dry else suite.settings | suite.full
        config = tclip.Config(root=given.root, compile=way == "compiled", epochs=1 if given.dry else 40, **settings)
        task = suite.load(config, 60 if given.dry else 10_000)
        with computing(way):
            row = run.one_run("cifar10-votes", "tclip", config, task)
        for name in ("unlabeled", "heldout", "labels"):
            yield way, name, "", [row[name]]
        yield way, "training", "s", [row["seconds"]]

    for way in WAYS[: 1 if given.dry else 3]:
        measured(given, f"precision, {way}", partial(figures, way=way))


votes = partial(results_of, "cifar10-votes")
PARTS = {  # name: (its limit in seconds, the part)
    "tclip": (300, votes("--methods", "tclip", "--seeds", "1")),  # its seconds are those of a whole training
    "truth": (240, votes("--teacher", "truth", "--methods", "cross-entropy", "--seeds", "1")),
    "speed-32": (200, partial(training_speed, size=32)),
    "labels": (30, labels),
    "profile": (60, profile),
    "eurosat": (150, results_of("eurosat-gpt4v", "--methods", "tclip,cross-entropy", "--seeds", "1")),
    "cross-entropy": (240, votes("--methods", "cross-entropy", "--seeds", "1")),
    "ELR": (240, votes("--methods", "ELR", "--seeds", "1")),
    "SupCon": (240, votes("--methods", "SupCon + CE", "--seeds", "1")),
    "clip": (60, clip),
    "precision": (200, precision),
    "speed-64": (200, partial(training_speed, size=64)),
    "seeds": (900, votes("--methods", "tclip,cross-entropy,ELR,SupCon + CE", "--seeds", "3")),
}


def pack(root, folder, heldout=2000):
    """Copy what the parts read to a new folder: CIFAR-10, the answers, and as much of EuroSAT as is needed."""
    root, folder = Path(root), Path(folder)
    folder.mkdir(parents=True)
    for name, what in (("cifar10.tar.xz", suites.CIFAR10), ("cifar10_clip_vitl14_votes.npz", suites.VITL14)):
        shutil.copyfile(suites.need(root, name, what), folder / name)
    shutil.copyfile(suites.need(root, "eurosat_gpt4v.csv", suites.GPT4V), folder / "eurosat_gpt4v.csv")
    with open(folder / "eurosat_gpt4v.csv", newline="", encoding="utf-8") as file:
        asked = {row["file"] for row in csv.DictReader(file)}
    eurosat = suites.need(root, "eurosat.zip", suites.EUROSAT)
    with zipfile.ZipFile(eurosat) as whole, zipfile.ZipFile(folder / eurosat.name, "w") as part:
        files = {"/".join(name.split("/")[-2:]): name for name in whole.namelist() if name.endswith(".jpg")}
        others = sorted(files.keys() - asked)
        for name in sorted(asked | {others[i] for i in suites.random_rows(len(others), heldout)}):
            part.writestr(name, whole.read(files[name]))
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / MIB:.1f} MiB")


def in_own_process(part, given):
    """What the process of a part does: it leads a group of its own, so that its workers end with it."""
    os.setsid()
    part(given)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser("gpu.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data [data]")
    parser.add_argument("--results", type=Path, default=run.RESULTS / "gpu", help="folder of the results [results/gpu]")
    parser.add_argument("--minutes", type=float, default=15, help="the time there is [15]")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts, in this order [all]")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--pack", metavar="FOLDER", help="copy the data that is needed to a new folder, and end")
    given = parser.parse_args(argv)
    if given.pack:
        return pack(given.root, given.pack)
    given.device = "cpu" if given.dry else "cuda"
    given.results.mkdir(parents=True, exist_ok=True)
    fork, end = multiprocessing.get_context("fork"), time.time() + 60 * given.minutes  # no time for imports again
    for name in given.only:
        limit, part = PARTS[name]
        started, process = time.time(), fork.Process(target=in_own_process, args=(part, given))
        if end - started < 10:
            print(f"{name}: no time left")
            continue
        process.start()
        process.join(min(limit, end - started))
        state = "stopped at its limit" if process.is_alive() else "done" if process.exitcode == 0 else "failed"
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        print(f"{name}: {state}, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
