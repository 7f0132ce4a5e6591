"""Benchmark: tclip beside other ways to learn from the same noisy pseudo-labels, several seeds each.

    python tutorials/benchmark.py --suite digits                     # offline
    python tutorials/benchmark.py --suite mnist --root data          # 2,000 digits of MNIST
    python tutorials/benchmark.py --suite eurosat --root data        # EuroSAT, sized for a CPU
    python tutorials/benchmark.py --suite cifar10 --root data --full # CIFAR-10 with a ResNet-18, for a GPU
    python tutorials/benchmark.py --suite digits --methods tclip,GCE --seeds 3
    python tutorials/benchmark.py --suite digits --study             # tclip with one setting changed, one by one
    python tutorials/benchmark.py --suite cifar10 --root data --images 50000 --epochs 20 --seeds 1   # all images
    python tutorials/benchmark.py --suite cifar10 --root data --teacher truth --methods cross-entropy   # a ceiling

The methods are those of baselines.py. A finished run is one row of results/SUITE.csv at once (SUITE-study.csv,
SUITE-truth.csv, SUITE-50000.csv, SUITE-20-epochs.csv for --study, --teacher truth, --images 50000, --epochs 20), so
that an interrupted benchmark goes on where it was: call it again. A row counts for the settings that it was made with;
when those change it stays in the file, but is left out of the table, and the run is done anew. At the end (and when
nothing is left to do) the table of all rows that count, earlier ones too, is printed, and drawn to a picture beside the
csv file.

Truth is read after a run to count what is right, and by nothing before (but where --teacher truth asks for it). The
student is that of the last epoch.

Suites, and who names the images where no CLIP is asked for (--teacher clip):

    digits    the offline CLIP
    mnist     the offline CLIP, once the margin of 4 pixels is cut off: it was taught digits that fill their image
    eurosat   a *simulated* annotator: see simulated_annotator() below
    cifar10   where ROOT/cifar10_annotator.npz lies, the out-of-fold predictions in it, of a network trained on noisy
              labels: as often right as a CLIP, but no CLIP. ROOT/cifar10/ then has the images: unlabeled/*.jpg,
              test/CLASS/*.jpg, classes.txt and truth.csv (file, label). Elsewhere CLIP names torchvision's CIFAR-10.

--teacher truth gives a method the true labels: how much can the network learn of these images at all?
"""

import argparse
import csv
import hashlib
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # tclip.py and baselines.py of this checkout
import baselines
from baselines import METHODS, STUDY

import tclip
from tclip import UserError

RESULTS = HERE / "results"
ALL_METHODS = STUDY | METHODS
# Without --full: settings for a CPU, and how many of the unlabeled images are taken. (Of so few natural images, batches
# of 128 make too few steps, for all methods alike.)
SMALL = {
    "digits": ({}, None),
    "mnist": (dict(size=16, arch="resnet8", clip="offline"), 2000),
    "eurosat": (dict(size=32, arch="resnet8", batch_size=64), 6000),
    "cifar10": (dict(size=32, arch="resnet8", batch_size=64), 10_000),
}


# ======================================================================================================================
# Tasks: images, and what a teacher says of them
# ======================================================================================================================


@dataclass
class Task:
    """images are unlabeled, for training; heldout are not. probs and heldout_probs (None: not known): the teacher's."""

    images: tclip.Images
    heldout: tclip.Images
    probs: torch.Tensor
    heldout_probs: torch.Tensor | None
    teacher: str


def subset(images, rows):
    """The Images at the positions `rows`, int64."""
    names = [images.names[i] for i in rows]
    return tclip.Images(images.pixels[rows], names, images.classes, images.truth[rows])


def load_task(config, teacher=None, count=None):
    """The Task of the data set config.dataset, see the top. count: so many of its unlabeled images, None: all."""
    simulations = {"eurosat": simulated_eurosat, "cifar10": annotated_cifar10}
    if teacher is None:
        there = config.dataset == "eurosat" or cifar10_annotator(config).exists()
        teacher = "simulated" if there and config.dataset in simulations else "clip"
    if teacher == "truth":
        task = load_task(config, count=count)
        probs = F.one_hot(task.images.truth, len(task.images.classes)).float()
        return replace(task, probs=probs, heldout_probs=None, teacher="the truth (a ceiling)")
    if teacher == "clip":
        return named_by_clip(config, count)
    if config.dataset not in simulations:
        raise UserError(f"no simulated teacher for {config.dataset}; there is one for {', '.join(simulations)}")
    task = simulations[config.dataset](config)
    rows = chosen(len(task.probs), count)
    return replace(task, images=subset(task.images, rows), probs=task.probs[rows])


def chosen(n, count):
    """Which `count` of n images are taken, int64: random ones, in order; None: all."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].sort().values


def named_by_clip(config, count=None):
    """The data set as tclip.run() sees it, or `count` of its unlabeled images."""
    teacher = tclip.load_clip(config.clip, tclip.pick_device(config.device))
    templates = tclip.DATASETS[config.dataset].templates
    unlabeled, classes = tclip.open_dataset(config.dataset, config.root)
    heldout, _ = tclip.open_dataset(config.dataset, config.root, "test")
    if count:
        unlabeled = torch.utils.data.Subset(unlabeled, chosen(len(unlabeled), count).tolist())
    if (config.dataset, config.clip) == ("mnist", "offline"):
        unlabeled, heldout = ([cut_margin(*pair) for pair in part] for part in (unlabeled, heldout))
    prompts = tclip.text_classifier(teacher, classes, templates).cpu()
    images, probs = [], []
    for source in (unlabeled, heldout):
        pixels, names, truth, features, _ = tclip.read_images(
            source, config.size, teacher.prepare, teacher.encode_images, title=config.dataset
        )
        images.append(tclip.Images(pixels, names, classes, truth))
        probs.append(tclip.zero_shot_probs(features, prompts))
    return Task(*images, *probs, f"CLIP {config.clip}")


def cut_margin(image, label):
    """MNIST's digit alone: each was fitted into a box of 20 x 20 pixels within 28 x 28 (LeCun et al. 1998)."""
    return image.crop((4, 4, 24, 24)), label


def cifar10_annotator(config):
    """The file with the predictions of CIFAR-10's annotator."""
    return Path(config.root) / "cifar10_annotator.npz"


def annotated_cifar10(config):
    """CIFAR-10 from files, and the predictions in cifar10_annotator.npz. UserError: they do not fit each other."""
    folder, file = Path(config.root) / "cifar10", cifar10_annotator(config)
    saved, classes = read_arrays(file), tclip.listed(str(folder / "classes.txt"))
    if saved["classes"].tolist() != classes:
        raise UserError(f"the classes of {file} are not those of {folder}")
    images = read_folder(folder / "unlabeled", str(folder / "truth.csv"), classes, config.size)
    heldout = read_folder(folder / "test", "folders", classes, config.size)
    if missing := set(saved["files"].tolist()) - set(images.names):
        raise UserError(f"{folder / 'unlabeled'} lacks {len(missing)} images of {file}, such as {min(missing)}")
    probs = tclip.match(images.names, saved["files"].tolist(), torch.from_numpy(saved["probs"]).float())
    return Task(images, heldout, probs, None, "annotator of CIFAR-10, no CLIP")


def read_folder(path, truth, classes, size):
    """Images of the files below `path`, in the order of their names. truth: as in tclip.read_truth()."""
    source = tclip.Folder(path)
    source.labels = tclip.read_truth(truth, source.names, classes)
    pixels, names, truth, _, _ = tclip.read_images(source, size, title=path.name)
    return tclip.Images(pixels, names, classes, truth)


def read_arrays(path):
    """The arrays of an .npz file as a dict. UserError: it cannot be read."""
    try:
        with np.load(path) as file:
            return dict(file)
    except Exception as error:  # numpy and zipfile raise half a dozen kinds
        raise UserError(f"cannot read {path}: {tclip.first_line(error)}. Delete it if it is cut off") from error


# ======================================================================================================================
# EuroSAT's simulated annotator: rich but misnaming, as CLIP is
# ======================================================================================================================

BENT = {  # class: (a similar one, towards which its prototype is moved, and how far; it then takes images of that)
    "annual crop land": ("pasture land", 0.5),
    "forest": ("lake or sea", 0.05),
    "brushland or shrubland": ("pasture land", 0.55),
    "highway or road": ("river", 0.6),
    "industrial buildings or commercial buildings": ("residential buildings or homes or apartments", 0.2),
    "pasture land": ("brushland or shrubland", 0.5),
    "permanent crop land": ("brushland or shrubland", 0.65),
    "residential buildings or homes or apartments": ("industrial buildings or commercial buildings", 0.1),
    "river": ("lake or sea", 0.55),
    "lake or sea": ("forest", 0.2),
}
ANNOTATOR = dict(  # what the answers depend on
    config=dict(size=32, arch="resnet8", epochs=24, batch_size=128), labeled=9000, calibration=1800, bent=BENT
)


def simulated_eurosat(config):
    """EuroSAT without the third that the annotator learned from, and the annotator's answers, made once and kept."""
    digest = hashlib.sha256(json.dumps(ANNOTATOR).encode()).hexdigest()[:10]
    path = Path(config.root) / f"eurosat_annotator_{digest}.npz"
    if not path.exists():
        print(f"the annotator of EuroSAT is trained, once: some minutes, then it lies in {path}", flush=True)
        arrays = simulated_annotator(config.root)

        def write(draft):
            with open(draft, "wb") as file:
                np.savez(file, **arrays)

        tclip.write_whole(path, write)
    saved = read_arrays(path)
    images, heldout = (tclip.load_images("eurosat", config.root, split, config.size) for split in ("train", "test"))
    rows = torch.from_numpy(saved["rows"])
    probs, heldout_probs = (torch.from_numpy(saved[name]) for name in ("unlabeled", "heldout"))
    return Task(subset(images, rows), heldout, probs, heldout_probs, f"simulated annotator {digest}")


def simulated_annotator(root):
    """Answers about EuroSAT by a network that sees well and names badly. It is no CLIP, and stands for none.

    A network is trained on a labeled third of the images. Its classes are then named by prototypes, the mean unit
    features of each, as CLIP's are by the embeddings of prompts; and each prototype is moved towards another, similar
    class (BENT), as if the prompt were ill chosen. So images of a class lie together, and whole classes are misnamed.
    The table was found by trying many, with the truth in view, for about 60 % right answers: some classes nearly always
    right, some nearly never, and none just renamed into another and back, which nobody could tell without labels. The
    temperature makes the mean confidence what the accuracy is, on a fifth of the third that was not learned from.

    Returns arrays: rows (N,), the positions of the other unlabeled images, and the probabilities `unlabeled` (N, C)
    and `heldout` (M, C). It repeats on the same machine, always on the CPU; another may round otherwise.
    """
    from sklearn.model_selection import train_test_split

    size = ANNOTATOR["config"]["size"]
    images, heldout = (tclip.load_images("eurosat", root, split, size) for split in ("train", "test"))
    labeled, rows = train_test_split(
        range(len(images.pixels)), train_size=ANNOTATOR["labeled"], stratify=images.truth, random_state=0
    )
    learned, calibration = train_test_split(
        labeled, test_size=ANNOTATOR["calibration"], stratify=images.truth[labeled], random_state=0
    )
    truth, learned = images.truth, torch.tensor(learned)
    config = tclip.complete(tclip.Config("eurosat", device="cpu", **ANNOTATOR["config"]))
    torch.manual_seed(0)
    network, optimizer = baselines.new_student(config, images)
    for epoch in baselines.epochs(config):
        network.train()
        for index in baselines.batches(config, optimizer, learned, epoch):
            views = tclip.augment(images.pixels[index], area=(0.6, 1.0), flip=0.5)  # (B, 3, H, W), one of each image
            baselines.descend(optimizer, F.cross_entropy(baselines.forward(network, views), truth[index]))

    network.eval().classifier = torch.nn.Identity()  # now it answers with its features
    with torch.inference_mode():
        features, heldout_features = (
            torch.cat([F.normalize(network(x.float() / 255)[0], dim=1) for x in part.pixels.split(1024)])
            for part in (images, heldout)
        )  # (N, D), unit rows
    means = torch.stack([features[learned[truth[learned] == c]].mean(0) for c in range(len(images.classes))])
    prototypes = bend(F.normalize(means, dim=1), images.classes, ANNOTATOR["bent"])
    scores = features @ prototypes.T
    temperature = calibrated_temperature(scores[calibration], truth[calibration])
    return dict(
        rows=np.array(rows),
        unlabeled=(scores[rows] / temperature).softmax(1).numpy(),
        heldout=(heldout_features @ prototypes.T / temperature).softmax(1).numpy(),
    )


def bend(prototypes, classes, bent):
    """Unit rows (C, D), each moved towards that of another class and made unit again."""
    partners = [classes.index(bent[name][0]) for name in classes]
    share = torch.tensor([[bent[name][1]] for name in classes])  # (C, 1)
    return F.normalize((1 - share) * prototypes + share * prototypes[partners], dim=1)


def calibrated_temperature(scores, truth):
    """The temperature at which softmax(scores / temperature) is on average as confident as it is right."""
    accuracy = tclip.score(scores, truth)["accuracy"]
    low, high = 1e-4, 1e2  # the confidence falls as the temperature rises: halve, on a scale of ratios
    for _ in range(50):
        middle = (low * high) ** 0.5
        confident = (scores / middle).softmax(1).amax(1).mean() > accuracy
        low, high = (middle, high) if confident else (low, middle)
    return middle


# ======================================================================================================================
# Runs and their rows
# ======================================================================================================================


def settings_of(name, config, task):
    """All that a row's numbers follow from, but the seed, as json: rows count as long as this is the same.

    The code is not part of it: after a change that matters, delete the file of the results.
    """
    method = ALL_METHODS[name]
    config = replace(config, **method.settings)
    fields = asdict(config)
    if method.train is not tclip.train:  # the others read these only
        shared = ("dataset", "size", "arch", "views", "epochs", "batch_size", "lr", "weight_decay")
        fields = {name: fields[name] for name in shared}
    # without the contrastive loss, what it would do does not count
    idle = ("positives", "negatives", "temperature") if config.c3l_weight == 0 else ()
    settings = {k: v for k, v in fields.items() if k not in ("root", "clip", "seed", "device", "compile", "out", *idle)}
    settings |= {k: getattr(v, "__name__", v) for k, v in method.own.items()}
    names = hashlib.sha256(task.probs.argmax(1).numpy().tobytes()).hexdigest()[:10]
    settings |= dict(train=method.train.__name__, labels=method.labels.__name__, teacher=task.teacher, names=names)
    return json.dumps(settings | dict(images=len(task.images.pixels), heldout=len(task.heldout.pixels)))


def digest_of(settings):
    """Ten letters for settings_of()."""
    return hashlib.sha256(settings.encode()).hexdigest()[:10]


def worst(result):
    """The accuracy of the worst class of a tclip.score()."""
    return min(accuracy for accuracy in result["per_class"] if accuracy is not None)


def one_run(name, config, task):
    """Train a student by the method `name`, and its row of the results. UserError: its predictions are not finite."""
    started = time.perf_counter()
    student, labels = ALL_METHODS[name].run(config, task.images, task.probs)
    seconds = time.perf_counter() - started
    probs, heldout_probs = (tclip.predict(student, part.pixels) for part in (task.images, task.heldout))
    if not probs.isfinite().all():
        raise UserError(f"{name}, seed {config.seed}: the student's predictions are not finite")
    by_student, by_teacher = tclip.score(probs, task.images.truth), tclip.score(task.probs, task.images.truth)
    unseen = None if task.heldout_probs is None else tclip.score(task.heldout_probs, task.heldout.truth)["accuracy"]
    device, settings = tclip.pick_device(config.device), settings_of(name, config, task)
    return dict(
        suite=config.dataset,
        method=name,
        seed=config.seed,
        transductive=by_student["accuracy"],
        inductive=tclip.score(heldout_probs, task.heldout.truth)["accuracy"],
        worst_class=worst(by_student),
        label_accuracy="" if labels is None else tclip.score(labels.cpu(), task.images.truth)["accuracy"],
        teacher=task.teacher,
        teacher_transductive=by_teacher["accuracy"],
        teacher_inductive="" if unseen is None else unseen,
        teacher_worst_class=worst(by_teacher),
        seconds=round(seconds, 1),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        torch=torch.__version__,
        digest=digest_of(settings),
        settings=settings,
    )


def read_rows(path):
    """Rows of the results so far, a dict of strings each."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def finished(path, config, task, methods):
    """The rows at `path` that count: of the present settings, by (method, seed), in the order of `methods`."""
    digests = {name: digest_of(settings_of(name, config, task)) for name in methods}
    rows = [row for row in read_rows(path) if row["digest"] == digests.get(row["method"])]
    rows.sort(key=lambda row: (list(methods).index(row["method"]), int(row["seed"])))
    return {(row["method"], int(row["seed"])): row for row in rows}


def benchmark(path, config, task, methods, seeds):
    """Do the runs that results at `path` lack. Seeds are the outer loop: what is there at any time can be compared."""
    done = finished(path, config, task, methods)
    missing = [(name, seed) for seed in range(seeds) for name in methods if (name, seed) not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, seed in (bar := tqdm(missing, config.dataset, unit="run", disable=None)):
        bar.set_postfix_str(f"{name}, seed {seed}")
        row = one_run(name, replace(config, seed=seed), task)
        tclip.write_csv(path, [*read_rows(path), row])  # whole or not at all
        tqdm.write(f"{name}, seed {seed}: {row['transductive']:.1%} of the unlabeled, {row['inductive']:.1%} of the "
                   f"held-out images right, {row['seconds']:.0f} s")  # fmt: skip


# ======================================================================================================================
# Table and picture
# ======================================================================================================================

COLUMNS = {
    "unlabeled": "transductive", "held out": "inductive", "worst class": "worst_class", "labels": "label_accuracy"
}  # fmt: skip


def mean_and_sd(values):
    """Mean and sample standard deviation, which is 0 for a single value; None where there is no value."""
    values = [float(value) for value in values if value != ""]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def summarise(rows):
    """A dict for each line of the table, the teacher first: name, seeds, seconds; (mean, sd) or None a column."""
    first = rows[0]
    teacher = {column: mean_and_sd([first.get(f"teacher_{field}", "")]) for column, field in COLUMNS.items()}
    lines = [dict(name=f"teacher: {first['teacher']}", seeds=0, seconds=None) | teacher]
    for name in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == name]
        figures = {column: mean_and_sd([row[field] for row in runs]) for column, field in COLUMNS.items()}
        seconds = mean_and_sd([row["seconds"] for row in runs])[0]
        lines.append(dict(name=name, seeds=len(runs), seconds=seconds) | figures)
    return lines


def table(lines):
    """The lines of summarise() in Markdown: percentages, mean ± standard deviation over the seeds."""

    def percent(figure, seeds):
        if figure is None:
            return ""
        return f"{100 * figure[0]:.1f}" + (f" ± {100 * figure[1]:.1f}" if seeds > 1 else "")

    cells = [["", *COLUMNS, "seconds", "seeds"]]
    for line in lines:
        figures = [percent(line[column], line["seeds"]) for column in COLUMNS]
        cells.append([line["name"], *figures, f"{line['seconds']:.0f}" if line["seeds"] else "", line["seeds"] or ""])
    widths = [max(len(str(cell)) for cell in column) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(str(c).ljust(w) for c, w in zip(row, widths)) + " |" for row in cells)


def draw(path, suite, lines):
    """Picture of the table: a bar a method for unlabeled and for held-out images, the teacher as vertical lines."""
    from matplotlib.figure import Figure

    teacher, *methods = lines
    figure = Figure((8, 1.6 + 0.42 * len(methods)), layout="constrained")
    ax = figure.subplots()
    looks = {"unlabeled": ("#0072B2", "", "-"), "held out": ("#E69F00", "//", "--")}  # Okabe and Ito's palette
    for offset, (column, (color, hatch, style)) in zip((-0.2, 0.2), looks.items()):
        means, sds = zip(*((100 * line[column][0], 100 * line[column][1]) for line in methods))
        places = [place + offset for place in range(len(methods))]
        errors = dict(xerr=sds, capsize=2) if any(sds) else {}
        ax.barh(places, means, 0.38, color=color, hatch=hatch, edgecolor="white", label=column, **errors)
        if teacher[column]:
            ax.axvline(100 * teacher[column][0], color="black", linestyle=style, label=f"teacher, {column}")
    seeds = sorted({line["seeds"] for line in methods})
    spread = "one seed" if seeds == [1] else f"mean and standard deviation, {'-'.join(map(str, seeds))} seeds"
    ax.set_yticks(range(len(methods)), [line["name"] for line in methods])
    ax.invert_yaxis()  # the first on top
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"images right, % ({spread})")
    ax.set_ylabel("method")
    ax.set_title(f"{suite}, {teacher['name']}")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120, format="png")


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    usage, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=SMALL, default="digits", help="which data [digits]")
    parser.add_argument("--seeds", type=int, default=5, help="how many: 0, 1, ... [5]")
    parser.add_argument("--methods", help="names, with commas between them [all]")
    parser.add_argument("--study", action="store_true", help="tclip with other settings, in place of other methods")
    parser.add_argument("--images", type=int, help="how many unlabeled ones [the suite's]")
    parser.add_argument("--epochs", type=int, help="passes over the images [as python tclip.py]")
    parser.add_argument("--full", action="store_true", help="all images and the full network, for a GPU")
    parser.add_argument("--root", default="data", help="folder of the data sets [data]")
    parser.add_argument("--teacher", choices=("simulated", "clip", "truth"), help="who names the images [see above]")
    arguments = parser.parse_args(argv)
    try:
        known = STUDY if arguments.study else METHODS
        methods = arguments.methods.split(",") if arguments.methods else list(known)
        for name in methods:
            if name not in known:
                raise UserError(f"unknown method {name!r}; there is: {tclip.nearest(name, known)}")
        if arguments.seeds < 1:
            raise UserError(f"--seeds {arguments.seeds}: must be at least 1")
        if arguments.images is not None and arguments.images < 1:
            raise UserError(f"--images {arguments.images}: must be at least 1")
        small, count = ({}, None) if arguments.full else SMALL[arguments.suite]
        if arguments.epochs is not None:
            small = small | dict(epochs=arguments.epochs)
        config = tclip.complete(tclip.Config(arguments.suite, root=arguments.root, **small))
        task = load_task(config, arguments.teacher, arguments.images or count)
        variant = ["study"] * arguments.study + ["truth"] * (arguments.teacher == "truth")
        variant += [str(arguments.images)] * bool(arguments.images)
        variant += [f"{arguments.epochs}-epochs"] * bool(arguments.epochs)
        path = RESULTS / f"{'-'.join([arguments.suite, *variant])}.csv"
        benchmark(path, config, task, methods, arguments.seeds)
        lines = summarise(list(finished(path, config, task, known).values()))
        tclip.write_whole(path.with_suffix(".png"), lambda draft: draw(draft, arguments.suite, lines))
    except UserError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nbenchmark: stopped. What is finished is kept: go on with the same command.", file=sys.stderr)
        return 130
    print(table(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
