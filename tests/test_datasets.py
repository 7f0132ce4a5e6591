"""The table of data sets and the reading of images, with stand-ins for torchvision's downloads."""

import inspect
import os
import random
import re
import sys
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import tclip
from tclip import DATASETS, UserError, load_images, open_dataset, square, with_the

DOWNLOADED = [name for name, recipe in DATASETS.items() if isinstance(recipe.source, str)]
LENGTHS = dict(digits=10, eurosat=10, svhn=10, mnist=10, fashionmnist=10)
PROMPTS = {  # wordings of openai/CLIP, data/prompts.md
    "cifar10": {"a photo of a {}.", "a black and white photo of the {}.", "a photo of the big {}."},
    "cifar100": {"a blurry photo of a {}.", "a low contrast photo of the {}.", "a photo of the small {}."},
    "stl10": {"a photo of a {}.", "a photo of the {}."},
    "eurosat": {f"a centered satellite photo of {article}{{}}." for article in ("", "a ", "the ")},
    "mnist": {'a photo of the number: "{}".'},
    "food101": {"a photo of {}, a type of food."},
    "dtd": {"a photo of a {} texture.", "a photo of the {} object."},
    "flowers102": {"a photo of a {}, a type of flower."},
    "oxford-pets": {"a photo of a {}, a type of pet."},
    "caltech101": {"a photo of a {}.", "a drawing of the {}."},
}


@pytest.mark.parametrize("name", DATASETS)
def test_entry(name):
    """Each entry can work: its class takes its arguments, its prompts have one place for the name, its rest exists."""
    recipe = DATASETS[name]
    source = getattr(torchvision.datasets, recipe.source) if name in DOWNLOADED else recipe.source
    assert recipe.train and len(recipe.templates) == len(set(recipe.templates)) > 0
    for keywords in (*recipe.train, *recipe.test):
        inspect.signature(source).bind(root="data", download=True, **keywords)
    assert all(template.count("{}") == 1 and template.count("{") == 1 for template in recipe.templates)
    assert PROMPTS.get(name, set()) <= set(recipe.templates)
    if recipe.classes:
        assert len(set(recipe.classes)) == len(recipe.classes) == LENGTHS[name]
    tclip.Config(dataset=name, size=recipe.size, views=recipe.views, class_prior=recipe.class_prior)
    tclip.Student(recipe.arch, 2, recipe.size)
    assert recipe.clip in (*tclip.OPENAI_CLIP, "offline")


@pytest.mark.parametrize("name", DOWNLOADED)
def test_parts(name, tmp_path):
    """torchvision knows every part that is asked of it: in an empty folder it misses files, and nothing else."""
    for keywords in (*DATASETS[name].train, *DATASETS[name].test):
        with pytest.raises((RuntimeError, FileNotFoundError), match="(?i)not found"):
            getattr(torchvision.datasets, DATASETS[name].source)(root=tmp_path, download=False, **keywords)


def test_number_of_prompts():
    """As many as OpenAI used for these."""
    assert {name: len(DATASETS[name].templates) for name in ("cifar10", "cifar100", "dtd", "eurosat", "stl10")} == dict(
        cifar10=18, cifar100=18, dtd=8, eurosat=3, stl10=2
    )


def test_with_the():
    """Only the article right before the class name, or before its adjective, becomes "the"."""
    templates = ("a photo of a {}.", "a photo of a big {}.", "a {} on a table.", "a photo of {}.")
    assert with_the(*templates) == templates + (
        "a photo of the {}.",
        "a photo of the big {}.",
        "the {} on a table.",
        "a photo of {}.",
    )


# What of a torchvision data set is read besides its items, by class: names of the classes, and labels where we split.
ATTRIBUTES = dict(
    CIFAR10=["classes"], CIFAR100=["classes"], STL10=["classes"], EuroSAT=["classes", "targets"], SVHN=[],
    MNIST=["classes"], FashionMNIST=["classes"], Food101=["classes"], DTD=["classes"], Flowers102=["classes"],
    OxfordIIITPet=["classes"], Caltech101=["categories", "y"],
)  # fmt: skip


class Stand(list):
    """In place of a data set of torchvision: (PIL image, label) pairs, and the attributes above."""

    def __init__(self, real, classes, n, keywords):
        inspect.signature(real).bind(**keywords)
        assert keywords["download"] is True
        part = keywords.get("split", keywords.get("train", ""))
        rng = random.Random(str(part))  # a part has images of its own
        labels = [i % classes for i in range(n)]
        if "unlabeled" in str(part):
            labels = [-1 if i % 3 else label for i, label in enumerate(labels)]
        shape = (12, 9, 3) if real.__name__ != "MNIST" else (12, 9)
        draw = lambda: Image.fromarray(np.random.default_rng(rng.randrange(10**6)).integers(0, 256, shape, np.uint8))  # noqa: E731
        super().__init__((draw(), label) for label in labels)
        names = [f"name_{i}" for i in range(classes)]
        values = dict(classes=names, categories=names, targets=labels, y=labels)
        for name in ATTRIBUTES[real.__name__]:
            setattr(self, name, values[name])


def lay_stand_in(monkeypatch, source, classes=10, n=50):
    """Replace torchvision.datasets.<source>. Returns the list of the parts that were opened."""
    real, opened = getattr(torchvision.datasets, source), []

    def stand(**keywords):
        opened.append(Stand(real, classes, n, keywords))
        return opened[-1]

    monkeypatch.setattr(torchvision.datasets, source, stand)
    return opened


@pytest.mark.parametrize("name", DOWNLOADED)
def test_reading(name, monkeypatch, tmp_path):
    """Every entry, end to end: pixels, labels, names and class names of both splits, against the items themselves."""
    recipe, ids = DATASETS[name], {}
    opened = lay_stand_in(monkeypatch, recipe.source)
    for split in ("train", "test"):
        opened.clear()
        images = load_images(name, tmp_path, split, size=8)
        items = [item for part in opened for item in part]
        ids[split] = [int(i) for i in images.names]
        assert len(set(ids[split])) == len(ids[split]) == len(images.pixels)
        for i, pixels, truth in zip(ids[split], images.pixels, images.truth.tolist()):
            assert torch.equal(pixels, square(items[i][0], 8)) and truth == items[i][1]
        assert images.classes == list(recipe.classes or [f"name {i}" for i in range(10)])
        assert images.pixels.dtype == torch.uint8 and images.truth.dtype == torch.int64 and images.features is None
        if recipe.test:
            assert ids[split] == list(range(50 * len(recipe.train if split == "train" else recipe.test)))
    if not recipe.test:  # held out of one and the same set
        assert sorted(ids["train"] + ids["test"]) == list(range(50)) and len(ids["test"]) == 10
    assert (-1 in load_images(name, tmp_path, "train", size=8).truth) == (name == "stl10")


def test_digits():
    """The digits are scikit-learn's: 1437 and 360 of them, stratified, apart, and the same ones always."""
    data = load_digits()
    splits = {}
    for split, n in (("train", 1437), ("test", 360)):
        torch.manual_seed(n), random.seed(n), np.random.seed(n)
        images = splits[split] = load_images("digits", split=split, size=8)
        index = np.array([int(i) for i in images.names])
        assert len(index) == n and load_images("digits", split=split, size=8).names == images.names
        shades = torch.from_numpy(data.images[index]) * 255 / 16
        torch.testing.assert_close(images.pixels[:, 0].double(), shades, rtol=0, atol=0.5)
        assert torch.equal(images.pixels[:, :1].expand(-1, 3, -1, -1), images.pixels)
        assert images.truth.tolist() == data.target[index].tolist()
        shares = np.bincount(images.truth, minlength=10) / np.bincount(data.target)
        np.testing.assert_allclose(shares, n / 1797, atol=0.01)
    assert sorted(splits["train"].names + splits["test"].names) == [f"{i:05d}" for i in range(1797)]
    assert splits["train"].classes[3] == "three"


def test_features_belong_to_their_images():
    """The teacher sees every image at its own size, in the order of the pixels."""
    teacher = tclip.Teacher(partial(tclip.square, size=12), lambda x: x.float().flatten(1)[:, :5], None)
    images = load_images("digits", split="test", size=8, teacher=teacher)
    digits = load_digits().images
    for i in (0, 100, 359):
        gray = (digits[int(images.names[i])] * (255 / 16)).round().astype(np.uint8)
        expected = square(Image.fromarray(gray), 12).float().flatten()[:5]
        assert torch.equal(images.features[i], expected)


FOLDERS = dict(
    AnnualCrop="annual crop", Forest="forest", HerbaceousVegetation="brushland", Highway="highway",
    Industrial="industrial", Pasture="pasture", PermanentCrop="permanent crop", Residential="residential",
    River="river", SeaLake="sea",
)  # fmt: skip


@pytest.fixture(scope="module")
def eurosat(reference, tmp_path_factory):
    """A small part of the real EuroSAT, ten images of each class, as torchvision lays it out."""
    root = tmp_path_factory.mktemp("data")
    with zipfile.ZipFile(reference("eurosat.zip")) as archive:
        for folder in FOLDERS:
            for i in range(1, 11):
                archive.extract(f"eurosat/2750/{folder}/{folder}_{i}.jpg", root)
    return root


def test_eurosat(eurosat):
    """Real EuroSAT through torchvision's own class: the readable names stand for the folders they were made of."""
    files = sorted((eurosat / "eurosat/2750").glob("*/*.jpg"))
    for split, n in (("train", 80), ("test", 20)):
        images = load_images("eurosat", eurosat, split)
        assert len(images.pixels) == n and torch.bincount(images.truth).tolist() == [n // 10] * 10
        for name, pixels, truth in zip(images.names, images.pixels, images.truth):
            file = files[int(name)]
            assert FOLDERS[file.parent.name] in images.classes[truth]
            assert np.array_equal(pixels.permute(1, 2, 0), np.asarray(Image.open(file)))  # 64 px as they are


def test_eurosat_lacks_a_class(eurosat, tmp_path):
    """An unpacking that was cut off must not shift the class names: it is an error."""
    for file in (eurosat / "eurosat/2750").glob("[A-P]*/*.jpg"):  # Residential, River and SeaLake are missing
        copy = tmp_path / file.relative_to(eurosat)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="eurosat"):
        load_images("eurosat", tmp_path)


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(str(part) in message for part in parts), message


@pytest.mark.parametrize("name", DOWNLOADED)
def test_no_network(name, offline, tmp_path):
    """Without network: one line, with the data set, the reason, and the folder to bring from elsewhere."""
    root = tmp_path / "images"
    with pytest.raises(UserError) as error:
        open_dataset(name, root)
    one_line(error, f"cannot get {name}: ", tclip.first_line(error.value.__cause__), f"copy its folder {root}")


@pytest.mark.parametrize("message", ["File not found or corrupted.\nSecond line", "", "\n"])
def test_damaged_archive(monkeypatch, tmp_path, message):
    """An archive that torchvision cannot open: one line, which says what to delete, and names no other data set."""

    def damaged(**keywords):
        raise EOFError(message)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", damaged)
    with pytest.raises(UserError) as error:
        open_dataset("cifar10", tmp_path)
    one_line(error, "cannot get cifar10: ", f"delete what it left of cifar10 in {tmp_path}")
    assert "Second" not in str(error.value) and "stl10" not in str(error.value)


def test_really_damaged_archive(offline, tmp_path):
    """The same with torchvision's own class and a file that is cut off."""
    (tmp_path / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(UserError) as error:
        open_dataset("svhn", tmp_path)
    one_line(error, "cannot get svhn: ", f"delete what it left of svhn in {tmp_path}")


def test_unknown_name():
    """A misspelt name is answered with the nearest."""
    with pytest.raises(UserError, match=r"'cifar11'.*cifar10"):
        open_dataset("cifar11")


def test_unknown_split():
    """A misspelt split is an error: it must not give the training images, on which one would then be tested."""
    with pytest.raises((UserError, ValueError), match="val"):
        load_images("digits", split="val")


class Many:
    """More images than one process reads: image i is a plain grey of i modulo 251."""

    classes, data = [str(i) for i in range(10)], range(5003)

    def __init__(self, root, train=True, download=False):
        pass

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i >= len(self.data):
            raise IndexError
        return Image.new("RGB", (8, 8), (i % 251, i // 251, 7)), i % 10


@pytest.mark.skipif(sys.platform == "win32", reason="workers start slowly there")
def test_workers(monkeypatch, tmp_path):
    """Many images are read by several processes, each in its place, as by one."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Many)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)  # the cores we may use
    loader, workers = torch.utils.data.DataLoader, []

    def spy(*args, num_workers=0, **keywords):
        workers.append(num_workers)
        return loader(*args, num_workers=num_workers, **keywords)

    monkeypatch.setattr(torch.utils.data, "DataLoader", spy)
    images = load_images("cifar10", tmp_path, size=8)
    i = torch.arange(5003)
    assert workers == [2]
    assert torch.equal(images.pixels[:, :, 4, 4], torch.stack([i % 251, i // 251, torch.full_like(i, 7)], 1).byte())
    assert torch.equal(images.truth, i % 10)
    assert images.names[:2] == ["00000", "00001"] and re.fullmatch(r"0*5002", images.names[-1])
