"""How fast tclip is, and where it could be faster.

    python tutorials/speed.py                        # everything, on the device that tclip.py would take
    python tutorials/speed.py --only step,decode     # some sections
    python tutorials/speed.py --quick                # a smoke test: its figures mean nothing, and are not kept

Each section prints a table in Markdown, median and (lowest to highest) of several rounds, and keeps its rows in
results/speed.csv in place of the rows it had there for this device. What is compared is measured in turn, round after
round, so that whatever else the machine does falls on all alike. A ratio is taken within each round.

step      views a second (an image is seen in two views). a: the student alone, forward, backward and optimiser step on
          views that lie ready. b: tclip.train() with its ensemble labels, without the checkpoint. c: the loop as it is
          usually written: PIL images and torchvision's transforms in DataLoader workers, with the same network, batch
          and losses, in float32 and PyTorch's usual memory layout; "c, our layout" has tclip's precision and layout as
          well. Pixels are noise: the time does not depend on them.
teacher   images a second through CLIP, one process: Teacher.prepare and encode_images beside open_clip's own.
decode    JPEG files a second into the store of pixels; "+ 224 px": with the view of CLIP ViT-B/32 made as well.
start     seconds until Python has imported, and from the command `python tclip.py` to the end of the first epoch.
memory    the most that a process held, its workers apart: of the main command, and of runs on folders of many files.
devices   views a second of the digits' run by torchrun with 1, 2, 4, 8 processes, as far as there are GPUs or cores: a
          core each; or on GPUs a ResNet-18 at 32 px and batches of 128 images a process.
growth    microseconds and bytes an image, as images and classes get more. A flat column is what we want.
"""

import argparse
import csv
import io
import json
import logging
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

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import transforms

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]  # tclip.py of this checkout
import tclip
from tclip import UserError

RESULTS = HERE / "results" / "speed.csv"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


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


# ======================================================================================================================
# A step of training: a, b and c
# ======================================================================================================================

CASES = {  # the data set whose settings are taken; batch size and steps on a CPU, where a step may take seconds
    "ResNet-8, 16 px": ("digits", 128, 8),
    "ResNet-18, 32 px": ("cifar10", 32, 3),
    "ResNet-18, 64 px": ("eurosat", 16, 2),
}
CLASSES = [str(i) for i in range(10)]
A, B, C = "a: student alone", "b: tclip.train()", "c: DataLoader, PIL"


def usual_transforms(config):
    """What people write for such images. (The ranges are those of tclip.VIEWS, as far as torchvision has them.)"""
    whole = [transforms.RandomAffine(15, translate=(0.1, 0.1), scale=(0.9, 1.3))]
    part = [transforms.RandomResizedCrop(config.size, (0.3, 1.0)), transforms.RandomHorizontalFlip()]
    colour = [transforms.ColorJitter(0.4, 0.4, 0.4)]
    kinds = {
        "writing": whole + colour,
        "photo": part + colour + [transforms.RandomGrayscale(0.2)],
        "overhead": part + [transforms.RandomRotation(180)] + colour,
    }
    return transforms.Compose([*kinds[config.views], transforms.ToTensor()])


class TwoViews(torch.utils.data.Dataset):
    """Item i: two random views of the image i, and i."""

    def __init__(self, pixels, transform):
        self.images, self.transform = [transforms.functional.to_pil_image(image) for image in pixels], transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i]), i


def student_and_optimizer(config, device, layout):
    """What tclip.train() makes."""
    student = tclip.Student(config.arch, len(CLASSES), config.size).to(device, memory_format=layout).train()
    return student, torch.optim.SGD(student.parameters(), 0.01, 0.9, weight_decay=config.weight_decay, nesterov=True)


def bare(config, device, steps, layout=torch.channels_last):
    """Loop a, as a function that returns its seconds."""
    student, optimizer = student_and_optimizer(config, device, layout)
    views = torch.rand(2 * config.batch_size, 3, config.size, config.size, device=device)
    views = views.contiguous(memory_format=layout)
    targets = torch.rand(2 * config.batch_size, len(CLASSES), device=device).softmax(1)

    def work():
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=tclip.has_fast_bfloat16(device)):
                logits, z = student(views)
            optimizer.zero_grad()
            (F.cross_entropy(logits.float(), targets) + z.float().mean()).backward()  # z: the projector is trained, too
            optimizer.step()

    return lambda: seconds_of(work, device)


def usual(config, device, steps, pixels, probs, layout=torch.contiguous_format, bfloat16=False):
    """Loop c, as a function that returns its seconds. The clock starts when the workers have made their first batch."""
    student, optimizer = student_and_optimizer(config, device, layout)
    dataset, probs = TwoViews(pixels[: (steps + 1) * config.batch_size], usual_transforms(config)), probs.to(device)
    loader = torch.utils.data.DataLoader(
        dataset, config.batch_size, shuffle=True, num_workers=min(CORES, 16), persistent_workers=True,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    def work(batches):
        for first, second, index in batches:
            views = torch.cat([first.to(device, non_blocking=True), second.to(device, non_blocking=True)])
            targets = probs[index.to(device, non_blocking=True)]
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                logits, z = student(views.contiguous(memory_format=layout))
            loss = F.cross_entropy(logits.float(), targets.repeat(2, 1))
            loss = loss + tclip.class_conditional_contrastive_loss(z, targets, config.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def loop():
        batches = iter(loader)
        next(batches)
        return seconds_of(lambda: work(batches), device)

    return loop


def augmentation(config, device, steps, pixels):
    """The two views of each image alone, as a function that returns its seconds."""
    batch = pixels[: config.batch_size].to(device)

    def work():
        for _ in range(steps):
            tclip.augment(batch, views=2, **tclip.VIEWS[config.views])

    return lambda: seconds_of(work, device)


def in_turn(config, images, probs, others, rounds, device):
    """Epochs of tclip.train() and, after each, one run of each of the other loops: dict name -> seconds of each round.

    others: dict name -> function that returns its seconds. A first round, in which all warm up, does not count.
    """
    seconds = {name: [] for name in (B, *others)}
    begun = now(device)

    def on_epoch(row, student, labels):
        nonlocal begun
        times = {B: now(device) - begun} | {name: loop() for name, loop in others.items()}
        if row["epoch"] > 1:
            for name, value in times.items():
                seconds[name].append(value)
        begun = now(device)

    tclip.train(replace(config, epochs=rounds + 1), images, probs, on_epoch=on_epoch)
    return seconds


def step(device, rounds, quick):
    for case, (dataset, batch, steps) in list(CASES.items())[: 1 if quick else None]:
        if device.type != "cpu":
            batch, steps = 128, 40
        if quick:
            batch, steps = 8, 2
        config = tclip.complete(tclip.Config(dataset, batch_size=batch, device=device.type, out="nowhere"))
        pixels = torch.randint(0, 256, ((steps + 1) * batch, 3, config.size, config.size), dtype=torch.uint8)
        probs = torch.randn(len(pixels), len(CLASSES)).softmax(1)
        images = tclip.Images(pixels[: steps * batch], [str(i) for i in range(steps * batch)], CLASSES)
        ours = dict(layout=torch.channels_last, bfloat16=tclip.has_fast_bfloat16(device))
        loops = {
            A: bare(config, device, steps),
            f"{A}, contiguous": bare(config, device, steps, torch.contiguous_format),
            C: usual(config, device, steps, pixels, probs),
            f"{C}, our layout": usual(config, device, steps, pixels, probs, **ours),
            "augmentation": augmentation(config, device, steps, pixels),
        }
        seconds = in_turn(config, images, probs[: len(images.names)], loops, rounds, device)
        if device.type == "cuda":
            compiled = in_turn(replace(config, compile=True), images, probs[: len(images.names)], {}, rounds, device)
            seconds[f"{B}, --compile"] = compiled[B]
        case = f"{case}, batch {batch} x 2"
        speeds = {name: [2 * batch * steps / s for s in runs] for name, runs in seconds.items()}
        for name, runs in speeds.items():
            yield case, name, "views/s", runs
        for name, above, below in (
            ("b / a", B, A),
            ("b / c", B, C),
            ("b / c, our layout", B, f"{C}, our layout"),
            ("augmentation, share of b", B, "augmentation"),
        ):
            yield case, name, "", [x / y for x, y in zip(speeds[above], speeds[below])]


# ======================================================================================================================
# The teacher
# ======================================================================================================================


def photo(rng, width, height):
    """A random PIL image, smooth as photos are."""
    coarse = rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def teacher(device, rounds, quick):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for case, name, n in (("offline CLIP, 32 px", "offline", 256), ("ViT-B/32, 224 px", "ViT-B-32", 32)):
            if quick and name != "offline":
                continue
            photos = [photo(rng, 320, 240) for _ in range(8 if quick else n)]
            if name == "offline":
                state = torch.load(tclip.OFFLINE_CLIP, weights_only=True)
                model = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32)
                preprocess = open_clip.image_transform(32, is_train=False)
            else:  # random weights, as fast as any; open_clip would warn that they are
                logging.getLogger().setLevel(logging.ERROR)
                model, _, preprocess = open_clip.create_model_and_transforms(name)
                name = f"{name}:{folder}/weights.pt"
                torch.save(model.state_dict(), f"{folder}/weights.pt")
            model = model.to(device).eval().float()
            mine = tclip.load_clip(name, device)

            @torch.inference_mode()
            def theirs(photos=photos, model=model, preprocess=preprocess):
                batch = torch.stack([preprocess(image) for image in photos]).to(device)
                with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                    return model.encode_image(batch)

            works = {
                "prepare": lambda photos=photos, mine=mine: [mine.prepare(image) for image in photos],
                "open_clip's preprocess": lambda photos=photos, own=preprocess: [own(image) for image in photos],
                "prepare, encode": lambda photos=photos, mine=mine: mine.encode_images(
                    torch.stack([mine.prepare(image) for image in photos])
                ),
                "open_clip's both": theirs,
            }
            speeds = {name: [] for name in works}
            for turn in range(rounds + 1):
                for name, work in works.items():
                    speed = len(photos) / seconds_of(work, device)
                    if turn:  # the first warms up
                        speeds[name].append(speed)
            for name, runs in speeds.items():
                yield case, name, "images/s", runs
            pairs = zip(speeds["prepare, encode"], speeds["open_clip's both"])
            yield case, "ours / open_clip's", "", [x / y for x, y in pairs]


# ======================================================================================================================
# Files into the store of pixels
# ======================================================================================================================


def write_files(folder, contents):
    """Files 00000000.jpg, 00000001.jpg, ... in a new folder."""
    folder.mkdir()
    for i, content in enumerate(contents):
        (folder / f"{i:08d}.jpg").write_bytes(content)
    return folder


def jpeg(image):
    """The bytes of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def decode(device, rounds, quick):
    rng, clip_view = np.random.default_rng(0), partial(tclip.square, size=224)
    cases = {  # width and height of the files, side of the store, the view for CLIP, how many
        "32 px": (32, 32, 32, None, 1),
        "64 px": (64, 64, 64, None, 1),
        "64 px, + 224 px": (64, 64, 64, clip_view, 1),
        "500 x 375 px to 64 px, + 224 px": (500, 375, 64, clip_view, 0.1),
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (case, (width, height, size, view, share)) in enumerate(cases.items()):
            files = [jpeg(photo(rng, width, height)) for _ in range(10)]
            counts = {"one process": 2000, f"{CORES} workers": 6000}  # up to 2,000 images tclip starts no workers
            for name, n in counts.items():
                if name != "one process" and (quick or CORES == 1 or share < 1):
                    continue
                n = 20 if quick else round(n * share)
                here = write_files(Path(folder) / f"{number}-{n}", (files[i % 10] for i in range(n)))
                work = partial(tclip.read_images, tclip.Folder(here), size, view)
                runs = [n / seconds_of(work, device) for _ in range(rounds)]
                yield case, name, "files/s", runs


# ======================================================================================================================
# Commands
# ======================================================================================================================

MAIN = [sys.executable, str(HERE.parent / "tclip.py"), "--epochs", "1", "--no-cache"]


# A process counts as large at least as the one that started it, and this one is large: a small one stands between.
LAUNCHER = """import os, sys
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))"""


def call(*command, **environment):
    """Run a command to its end: (seconds, the most memory that it held in MB)."""
    begun = time.perf_counter()
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER]
    environment = os.environ | environment
    done = subprocess.run([*launcher, *map(str, command)], capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise UserError(f"{' '.join(map(str, command))}: {tclip.first_line(done.stderr)}")
    return seconds, int(done.stdout.split()[-1]) / (1e6 if sys.platform == "darwin" else 1e3)


def start(device, rounds, quick):
    code = f"""import sys, time
begun = time.perf_counter(); import torch
between = time.perf_counter(); sys.path.insert(0, {str(HERE.parent)!r}); import tclip
print(between - begun, time.perf_counter() - between)"""
    imports = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        imports.append(map(float, done.stdout.split()))
    for name, runs in zip(("import torch", "import tclip, beyond torch"), zip(*imports)):
        yield "imports", name, "s", list(runs)
    if quick:
        return
    first, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            begun, out = time.time(), Path(folder) / str(i)
            whole.append(call(*MAIN, "--device", device.type, "--out", out)[0])
            first.append((out / "metrics.csv").stat().st_mtime - begun)  # written after the epoch
    yield "python tclip.py --epochs 1", "to the end of the epoch", "s", first
    yield "python tclip.py --epochs 1", "to the end", "s", whole


def memory(device, rounds, quick):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not quick:
            peak = call(*MAIN, "--device", device.type, "--out", folder / "main")[1]
            yield "python tclip.py", "peak memory", "MB", [peak]
        file = jpeg(photo(np.random.default_rng(0), 8, 8))
        for n in (50,) if quick else (10_000, 100_000):
            images = write_files(folder / str(n), (file for _ in range(n)))
            answers = folder / f"{n}.csv"
            tclip.write_csv(answers, (dict(file=f"{i:08d}.jpg", label="dog" if i % 3 else "cat") for i in range(n)))
            settings = ["--images", images, "--pseudo-labels", answers, "--size", 8, "--arch", "resnet8", "--memory", 0]
            peak = call(*MAIN, "--device", device.type, "--out", folder / f"out-{n}", *settings)[1]
            yield f"{n:,} files of 8 px, --memory 0", "peak memory", "MB", [peak]


def devices(device, rounds, quick):
    there = torch.cuda.device_count() if device.type == "cuda" else CORES
    for processes in [n for n in (1, 2, 4, 8) if n <= (1 if quick else there)]:
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--standalone", "--nproc_per_node", processes, HERE.parent / "tclip.py", "--no-cache"]
        command += ["--device", device.type, "--epochs", rounds + 1]
        if device.type == "cuda":
            command += ["--arch", "resnet18", "--size", 32, "--batch-size", 128 * processes]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            call(*command, "--out", out, OMP_NUM_THREADS="1")
            images = json.loads((out / "summary.json").read_text())["images"]
            with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
                seconds = [float(row["seconds"]) for row in csv.DictReader(file)][1:]  # the first epoch warms up
        yield f"{processes} process" + "es" * (processes > 1), "training", "views/s", [2 * images / s for s in seconds]


# ======================================================================================================================
# Growth: what an image costs as they get more
# ======================================================================================================================


def resident(key):
    """VmRSS (memory held now) or VmHWM (the most since forget_peak()) of this process in bytes; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak():
    """Let VmHWM start anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def gather(n, size, rounds, device):
    """Microseconds an image to fetch random batches of 128 from a file of n images."""
    pixels = tclip.PixelFile((n, 3, size, size))
    for rows in torch.arange(n).split(10_000):
        pixels[rows[0].item() : rows[-1].item() + 1] = torch.full((len(rows), 3, size, size), 7, dtype=torch.uint8)
    batches = torch.randint(0, n, (100, 128))
    for turn in range(rounds + 1):
        seconds = seconds_of(lambda: [tclip.place(pixels, device)[index] for index in batches], device)
        if turn:
            yield 1e6 * seconds / batches.numel()


def labels_cost(n, classes, neighbours, rounds, device):
    """Of EnsembleLabels of (n, classes): dict of figures with a list of the rounds. peak: bytes beyond those held."""
    probs = torch.rand(n, classes, device=device).softmax(1)
    labels = tclip.EnsembleLabels(probs, neighbours=neighbours)
    answers, z = torch.rand(128, classes, device=device).softmax(1), F.normalize(torch.rand(128, 128), dim=1).to(device)
    runs = dict(record=[], end_epoch=[], held=[], peak=[])
    for _ in range(rounds):
        batches = torch.randperm(n, device=device)[: 100 * 128].split(128)

        def record(labels=labels, batches=batches):
            for index in batches:
                labels.record(index, answers[: len(index)], z[: len(index)])

        record()  # touches the memory
        runs["record"].append(1e6 * seconds_of(record, device) / sum(map(len, batches)))
        for index in torch.arange(n, device=device).split(10_000):  # every image is seen
            some = torch.arange(len(index), device=device) % 128
            labels.record(index, answers[some], z[some])
        runs["held"].append(sum(v.nbytes for v in vars(labels).values() if isinstance(v, torch.Tensor)) / n)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        elif sys.platform == "linux":
            forget_peak()
            before = resident("VmRSS")
        runs["end_epoch"].append(1e6 * seconds_of(labels.end_epoch, device) / n)
        if device.type == "cuda":
            runs["peak"].append((torch.cuda.max_memory_allocated() - before) / n)
        elif sys.platform == "linux":
            runs["peak"].append((resident("VmHWM") - before) / n)
    return runs


def growth(device, rounds, quick):
    for n in (100, 1000) if quick else (10_000, 100_000, 1_000_000):
        yield f"{n:,} images", "gather from a file of 16 px", "us/image", list(gather(n, 16, rounds, device))
    grid = [(10_000, 10), (50_000, 10), (100_000, 10), (10_000, 100), (10_000, 1000)]
    for n, classes in [(100, 3), (200, 3)] if quick else grid:
        case, runs = f"{n:,} images, {classes} classes", labels_cost(n, classes, 20, min(rounds, 2), device)
        yield case, "record", "us/view", runs["record"]
        yield case, "end_epoch", "us/image", runs["end_epoch"]
        yield case, "labels hold", "bytes/image", runs["held"]
        if runs["peak"]:
            yield case, "end_epoch takes beside", "bytes/image", runs["peak"]


# ======================================================================================================================
# Table and command line
# ======================================================================================================================

SECTIONS = dict(step=step, teacher=teacher, decode=decode, start=start, memory=memory, devices=devices, growth=growth)


def rounded(value):
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def table(rows):
    """Rows of one section in Markdown: cases and figures, the longer list of the two downwards."""
    cells = {}
    for row in rows:
        low, median, high = (rounded(float(row[name])) for name in ("low", "median", "high"))
        figure = f"{row['figure']}, {row['unit']}" if row["unit"] else row["figure"]
        cells[row["case"], figure] = f"{median} ({low} to {high})" if low != high else median
    down, across = (list(dict.fromkeys(names)) for names in zip(*cells))
    if len(across) > len(down):
        down, across, cells = across, down, {(figure, case): cell for (case, figure), cell in cells.items()}
    lines = [["", *across], ["---"] * (len(across) + 1)]
    lines += [[name, *(cells.get((name, other), "") for other in across)] for name in down]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device):
    """What a figure depends on besides the code."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {platform.machine()}"
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__)
    return dict(device=name, cores=CORES, threads=torch.get_num_threads(), **versions)


def keep(path, section, rows):
    """Put rows into the csv file, in place of those that it has of the same section and device."""
    old = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            old = [
                row for row in csv.DictReader(file) if (row["section"], row["device"]) != (section, rows[0]["device"])
            ]
    tclip.write_csv(path, old + rows)


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    usage, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them [all]")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured [5]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="[auto]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", type=Path, help=f"csv file [results/{RESULTS.name}; with --quick none]")
    arguments = parser.parse_args(argv)
    try:
        names = arguments.only.split(",")
        for name in names:
            if name not in SECTIONS:
                raise UserError(f"unknown section {name!r}; there is: {', '.join(SECTIONS)}")
        if arguments.rounds < 1:
            raise UserError(f"--rounds {arguments.rounds}: must be at least 1")
        device, rounds = tclip.pick_device(arguments.device), 2 if arguments.quick else arguments.rounds
        out = arguments.out or (None if arguments.quick else RESULTS)
        print(", ".join(f"{key} {value}" for key, value in machine(device).items()))
        for name in names:
            rows = []
            for case, figure, unit, runs in SECTIONS[name](device, rounds, arguments.quick):
                row = dict(section=name, case=case, figure=figure, unit=unit, median=statistics.median(runs))
                row.update(low=min(runs), high=max(runs), runs=" ".join(map(str, runs)))
                rows.append(row | machine(device))
            print(f"\n{name}\n\n{table(rows)}", flush=True)
            if out:
                keep(out, name, rows)
    except UserError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nspeed: stopped. The sections printed are kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
