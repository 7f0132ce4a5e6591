"""How fast tclip is, and where it could be faster.

    python tutorials/benchmark/speed.py                        # everything, on the device that tclip.py would take
    python tutorials/benchmark/speed.py --only step labels     # some sections
    python tutorials/benchmark/speed.py --quick                # a smoke test: its figures mean nothing

Each section prints a table in Markdown and keeps its rows in results/speed.csv, in place of those it had there for this
device. What is compared is measured in turn, round after round, so that whatever else the machine does falls on all
alike. A ratio is taken within each round.

step      views a second (an image is seen in two views). bare: the student alone, forward, backward and optimiser step
          on views that lie ready. train: tclip.train() with its labels. loader: the loop as it is usually written, PIL
          images and torchvision's transforms in DataLoader workers, with the same network, batch and losses, in float32
          and PyTorch's usual memory layout. Pixels are noise: the time does not depend on them.
clip      images a second through CLIP ViT-B/32 with random weights, from 320 x 240 px: tclip's reading ahead by threads
          beside open_clip's own preprocessing, one image after another.
start     seconds of the command `python tclip.py` to the end of its first epoch, of its imports, and its peak memory.
labels    seconds of EnsembleLabels.end_epoch() for 10 classes, and what it takes beside the labels. Linux or CUDA.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]  # tclip.py of this checkout
import tclip

RESULTS = HERE / "results" / "speed.csv"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CLASSES = 10


def now(device):
    """The time in seconds, once the device has done what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def seconds_of(work, device):
    """How long work() takes."""
    begun = now(device)
    work()
    return now(device) - begun


# ==== A step of training ==============================================================================================

CASES = {  # settings; batch size and steps on a CPU, where a step may take seconds
    "ResNet-8, 16 px": (dict(arch="resnet8", size=16, views="writing"), 128, 8),
    "ResNet-18, 32 px": (dict(arch="resnet18", size=32), 32, 3),
    "ResNet-18, 64 px": (dict(arch="resnet18", size=64), 16, 2),
}


class TwoViews(torch.utils.data.Dataset):
    """Item i: two random views of the image i, and i. As people write it, with the ranges of tclip.VIEWS["photo"]."""

    def __init__(self, pixels):
        self.images = [transforms.functional.to_pil_image(image) for image in pixels]
        part = [transforms.RandomResizedCrop(pixels.shape[-1], (0.3, 1.0)), transforms.RandomHorizontalFlip()]
        colour = [transforms.ColorJitter(0.4, 0.4, 0.4), transforms.RandomGrayscale(0.2)]
        self.transform = transforms.Compose([*part, *colour, transforms.ToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i]), i


def student_and_optimizer(config, device, layout):
    """What tclip.train() makes."""
    student = tclip.Student(config.arch, CLASSES, config.size).to(device, memory_format=layout).train()
    return student, torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=config.weight_decay, nesterov=True)


def bare(config, device, steps):
    """The student alone, as a function that returns its seconds."""
    student, optimizer = student_and_optimizer(config, device, torch.channels_last)
    views = torch.rand(2 * config.batch_size, 3, config.size, config.size, device=device)
    views = views.contiguous(memory_format=torch.channels_last)
    targets = torch.rand(2 * config.batch_size, CLASSES, device=device).softmax(1)
    model = torch.compile(student) if config.compile else student

    def work():
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=tclip.has_fast_bfloat16(device)):
                logits, z = model(views)
            optimizer.zero_grad()
            (F.cross_entropy(logits.float(), targets) + z.float().mean()).backward()  # z: the projector is trained, too
            optimizer.step()

    return partial(seconds_of, work, device)


def usual(config, device, steps, workers):
    """The DataLoader loop, as a function that returns its seconds. The clock starts once the first batch is there."""
    student, optimizer = student_and_optimizer(config, device, torch.contiguous_format)
    pixels = noise((steps + 1) * config.batch_size, config.size)
    targets = torch.rand(len(pixels), CLASSES, device=device).softmax(1)
    how = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda")
    loader = torch.utils.data.DataLoader(TwoViews(pixels), config.batch_size, shuffle=True, **how)

    def loop():
        batches = iter(loader)
        next(batches)
        begun = now(device)
        for batch in batches:
            first, second, index = (x.to(device, non_blocking=True) for x in batch)
            t = targets[index]
            logits, z = student(torch.cat([first, second]))
            c3l = tclip.class_conditional_contrastive_loss(z, t, config.temperature, config.class_share)
            optimizer.zero_grad()
            (F.cross_entropy(logits, t.repeat(2, 1)) + c3l).backward()
            optimizer.step()
        return now(device) - begun

    return loop


def noise(n, size):
    """Random pixels, uint8 (n, 3, size, size)."""
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8)


def in_turn(config, device, steps, rounds, others):
    """Epochs of `steps` steps of tclip.train() and, after each, one run of each of the other loops.

    others: dict name -> function that returns its seconds. Returns dict name -> views/s of each round; "train" is
    tclip.train(). A first round, in which all warm up, does not count.
    """
    pixels = noise(steps * config.batch_size, config.size)
    probs, seconds = torch.randn(len(pixels), CLASSES).softmax(1), {name: [] for name in ("train", *others)}
    begun = now(device)

    def on_epoch(row, student, labels):
        nonlocal begun
        times = dict(train=now(device) - begun) | {name: loop() for name, loop in others.items()}
        for name, value in times.items() if row["epoch"] > 1 else ():
            seconds[name].append(value)
        begun = now(device)

    tclip.train(replace(config, epochs=rounds + 1, device=device.type), pixels, probs, on_epoch=on_epoch)
    return {name: [2 * len(pixels) / s for s in runs] for name, runs in seconds.items()}


def step(device, rounds, quick):
    for case, (settings, batch, steps) in list(CASES.items())[: 1 if quick else None]:
        batch, steps = (8, 2) if quick else (128, 40) if device.type != "cpu" else (batch, steps)
        config = tclip.Config(batch_size=batch, **settings)
        loops = dict(bare=bare(config, device, steps), loader=usual(config, device, steps, min(CORES, 16)))
        yield from compared(f"{case}, batch {batch}", in_turn(config, device, steps, rounds, loops))


def compared(case, speeds, unit="views/s"):
    """The figures of in_turn(), and the ratios of the first, train(), to the others."""
    yield from ((case, name, unit, runs) for name, runs in speeds.items())
    first, *others = speeds
    for name in others:
        yield case, f"{first} / {name}", "", [x / y for x, y in zip(speeds[first], speeds[name])]


def clip(device, rounds, quick):
    import open_clip

    n = 4 if quick else 1024 if device.type == "cuda" else 32
    coarse = map(transforms.functional.to_pil_image, noise(min(n, 32), 40))  # smooth, as photos are
    photos = [image.resize((320, 240), Image.Resampling.BICUBIC) for image in coarse]
    with tempfile.NamedTemporaryFile(suffix=".pt") as weights:
        torch.save(open_clip.create_model("ViT-B-32", pretrained=None).state_dict(), weights.name)
        teacher = tclip.Clip(f"ViT-B-32:{weights.name}", device)
    prepare, parts = (lambda i: teacher.prepare(photos[i % len(photos)])), torch.arange(n).split(128)

    def speed_of(batches):
        return n / seconds_of(lambda: [teacher.encode_images(torch.stack(views)) for views in batches], device)

    def pair():
        return speed_of(tclip.read_ahead(prepare, n, "CLIP")), speed_of([prepare(i) for i in part] for part in parts)

    ours, theirs = zip(*[pair() for _ in range(rounds + 1)][1:])  # in the first round both warm up
    yield from compared("ViT-B/32", {"read ahead by threads": ours, "one after another": theirs}, "images/s")


# A process counts as large at least as the one that started it, and this one is large: a small one stands between.
LAUNCHER = """import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))"""


def call(*options):
    """Run `python tclip.py` with these options: (seconds, the most memory that it held in MB)."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, sys.executable, HERE.parents[1] / "tclip.py", *options]
    begun = time.perf_counter()
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - begun, int(done.stdout.split()[-1]) / (1e6 if sys.platform == "darwin" else 1e3)


def start(device, rounds, quick):
    yield "python tclip.py", "imports (--help)", "s", [call("--help")[0] for _ in range(1 if quick else rounds)]
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            options = "--epochs", 1, "--cache", "none", "--device", device.type, "--out"
            seconds, memory = zip(*(call(*options, Path(folder, str(i))) for i in range(rounds)))
        yield "python tclip.py", "one epoch", "s", seconds
        yield "python tclip.py", "peak memory", "MB", memory


def held(key):
    """VmRSS (memory held now) or VmHWM (the most so far) of this process, in bytes. Linux alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def end_epoch(device, n, classes=CLASSES):
    """One end_epoch() of n images that were all seen: seconds, and the most bytes that it takes beyond those held."""
    labels = tclip.EnsembleLabels(torch.randn(n, classes, device=device).softmax(1))
    for index in torch.arange(n, device=device).split(1000):
        z = F.normalize(torch.randn(len(index), 128, device=device), dim=1)
        labels.record(index, torch.randn(len(index), classes, device=device).softmax(1), z)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds_of(labels.end_epoch, device), torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = held("VmRSS")
    return seconds_of(labels.end_epoch, device), held("VmHWM") - before


def labels(device, rounds, quick):
    for n in (100, 200) if quick else (10_000, 50_000, 100_000):
        seconds, taken = zip(*(end_epoch(device, n) for _ in range(min(rounds, 3))))
        yield f"{n:,} images", "end_epoch", "s", seconds
        yield f"{n:,} images", "takes beside", "MB", [x / 1e6 for x in taken]


# ==== Table and command line ==========================================================================================

SECTIONS = dict(step=step, clip=clip, start=start, labels=labels)


def table(rows):
    """Rows in Markdown: a line each."""
    lines = ["| | | median | lowest to highest |", "|---|---|---|---|"]
    for row in rows:
        low, median, high = (f"{float(row[name]):,.4g}" for name in ("low", "median", "high"))
        lines.append(f"| {row['case']} | {row['figure']} | {median} {row['unit']} | {low} to {high} |")
    return "\n".join(lines)


def figure_row(section, case, figure, unit, runs, device):
    """A row of the results: the median, the ends and all runs, and what they depend on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    row = dict(section=section, case=case, figure=figure, unit=unit, median=statistics.median(runs), low=min(runs))
    row |= dict(high=max(runs), runs=" ".join(f"{run:.6g}" for run in runs), device=name, cores=CORES)
    return row | dict(threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)


def keep(path, section, rows):
    """Put rows into the csv file, in place of those that it has of the same section and device."""
    new = section, rows[0]["device"]
    old = csv.DictReader(path.read_text("utf-8").splitlines()) if path.exists() else []
    tclip.write_csv(path, [row for row in old if (row["section"], row["device"]) != new] + rows)


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser("speed.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections [all]")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured [5]")
    parser.add_argument("--device", default=tclip.DEVICES[0], choices=tclip.DEVICES, help=f"[{tclip.DEVICES[0]}]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"csv file [results/{RESULTS.name}; with --quick none]")
    given = parser.parse_args(argv)
    device, rounds = torch.device(given.device), 1 if given.quick else max(1, given.rounds)
    for name in given.only:
        rows = [figure_row(name, *figure, device) for figure in SECTIONS[name](device, rounds, given.quick)]
        print(f"\n{name}, {rows[0]['device']}\n\n{table(rows)}", flush=True)
        if given.out or not given.quick:
            keep(given.out or RESULTS, name, rows)


if __name__ == "__main__":
    main()
