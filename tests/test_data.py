"""The data sets and the reading of their images, by torchvision's own classes on small files of their formats."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_cifar10
from PIL import Image
from sklearn.datasets import load_digits

from tclip import DATASETS, Config, UserError, load_images, open_dataset, square

FOLDERS = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake"
WORDS = ["annual", "forest", "brush", "highway", "industr", "pasture", "permanent", "residential", "river", "sea"]


class Counting:
    """In place of a Clip: an image's features are 12 of its pixels, plus `shift`; counts the images it is asked for."""

    def __init__(self, shift=0.0, width=12):
        self.name, self.shift, self.width, self.asked = "ViT-B/32", shift, width, 0

    def prepare(self, image):
        return square(image, 12).float() / 255

    def encode_images(self, views):
        self.asked += len(views)
        return F.normalize(views.flatten(1)[:, : self.width] + 0.1 + self.shift, dim=1)


def mnist(root):
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        head = [bytes([0, 0, 8, d]) + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28)[:d]) for d in (3, 1)]
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head[0] + np.random.default_rng(0).bytes(20 * 784))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head[1] + bytes(i % 10 for i in range(20)))


def eurosat(root, archive=None):
    """Five images a class: the first of the archive, or noise."""
    for i, folder in enumerate(FOLDERS.split() * 5):
        file = root / f"eurosat/2750/{folder}/{folder}_{i // 10 + 1}.jpg"
        if archive:
            archive.extract(str(file.relative_to(root)), root)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(noise).save(file, quality=100)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(name) makes a small data set of that name in tmp_path."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    return lambda name: dict(mnist=mnist, cifar10=write_cifar10, eurosat=eurosat).get(name, lambda root: None)(tmp_path)


def items_of(name, root):
    """(PIL image, label) pairs for each split's names to point into, by torchvision or scikit-learn directly."""
    if name == "digits":
        digits = load_digits()
        gray = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in digits.images]
        return [list(zip(gray, digits.target))] * 2
    if name == "eurosat":
        return [[(Image.open(file), i // 5) for i, file in enumerate(sorted(root.glob("eurosat/2750/*/*.jpg")))]] * 2
    return [dict(mnist=torchvision.datasets.MNIST, cifar10=torchvision.datasets.CIFAR10)[name](root, t) for t in (1, 0)]


@pytest.mark.parametrize("name", [*DATASETS, "real eurosat"])
def test_reading(name, request, tmp_path, write):
    """Pixels, labels, features and names of both splits belong together, and are those of the images themselves."""
    if name == "real eurosat":
        name = "eurosat"
        with zipfile.ZipFile(request.getfixturevalue("reference")("eurosat.zip")) as archive:
            eurosat(tmp_path, archive)
    else:
        write(name)
    splits, recipe = [], DATASETS[name]
    for split, items in zip(("train", "test"), items_of(name, tmp_path)):
        clip = Counting()
        images = load_images(Config(dataset=name, root=str(tmp_path), size=8, cache="none"), split, clip)
        splits.append([int(i) for i in images.names])
        assert images.pixels.dtype == torch.uint8 and clip.asked == len(images.pixels) == len(images.names)
        for i, pixels, truth, features in zip(splits[-1], images.pixels, images.truth, images.features):
            image, label = items[i]
            assert torch.equal(pixels, square(image, 8)) and truth == label
            torch.testing.assert_close(features, clip.encode_images(clip.prepare(image)[None])[0])
    if "divided" in recipe:
        assert splits == [list(range(20))] * 2
    else:  # a fifth is held out, of each class, always the same
        assert sorted(splits[0] + splits[1]) == list(range(len(items))) and splits[1] == sorted(splits[1])
        labels = [np.bincount([items[i][1] for i in part], minlength=10) for part in splits]
        np.testing.assert_allclose(labels[1], sum(labels) / 5, atol=1)
        assert open_dataset(name, tmp_path, "test")[1] == images.names
    assert len(set(recipe["classes"])) == 10 and all(t.count("{}") == t.count("{") == 1 for t in recipe["templates"])
    assert name != "eurosat" or all(word in said for word, said in zip(WORDS, recipe["classes"]))
    assert len(set(recipe["templates"])) == dict(digits=3, mnist=1, cifar10=18, eurosat=3)[name]  # as many as OpenAI
    Config(dataset=name, **recipe["settings"])


@pytest.mark.parametrize("size", [8, 32, 33])
def test_square_is_clips_preprocessing(size):
    """square() is open_clip's preprocessing, to the pixel, for wide, tall, odd and grey images."""
    transform = pytest.importorskip("open_clip").image_transform(size, False, mean=(0,) * 3, std=(1,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (90, 67, 3), np.uint8)
    for pixels in (noise, noise[:50], noise[..., 0], noise[:9, :8, 0]):
        torch.testing.assert_close(
            square(Image.fromarray(pixels), size) / 255, transform(Image.fromarray(pixels)), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("name", ["mnist", "cifar10", "eurosat"])
def test_no_network(name, offline, tmp_path):
    """Without network: one line, with the data set and the folder to bring from elsewhere."""
    with pytest.raises(UserError, match=f"^tclip: cannot get {name}: [^\n]*copy {tmp_path}/data[^\n]*$"):
        open_dataset(name, f"{tmp_path}/data")


@pytest.mark.parametrize("fault, told", [(RuntimeError("not found or corrupted."), UserError), (KeyError(1), KeyError)])
def test_faults(fault, told, monkeypatch):
    """An archive that was cut off is told; what nobody foresaw keeps its traceback."""
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, **__: (_ for _ in ()).throw(fault))
    with pytest.raises(told, match="1|cannot get cifar10.*delete"):
        open_dataset("cifar10")


def test_features_are_kept(write, tmp_path):
    """A file for each data set, split and model: a second run asks CLIP for the first eight images only. Another model
    of that name, of another width even, other images, or fewer, are noticed."""
    write("cifar10")
    config = Config(dataset="cifar10", root=str(tmp_path), size=8, cache=str(tmp_path / "deep/cache"))

    def read(clip, split="train"):
        images = load_images(config, split, clip)
        expected = load_images(Config(**vars(config) | dict(cache="none")), split, Counting(clip.shift, clip.width))
        assert torch.equal(images.features, expected.features) and torch.equal(images.pixels, expected.pixels)
        return clip.asked

    assert [read(Counting()) for _ in range(2)] == [20, 8] and read(Counting(), "test") == 20
    files = sorted(file.name for file in (tmp_path / "deep/cache").iterdir())
    assert files == ["cifar10-test-ViT-B-32.npy", "cifar10-train-ViT-B-32.npy"]
    assert [read(Counting(shift=1.0)) for _ in range(2)] == [28, 8]  # it asked for eight, and then for all
    assert [read(Counting(width=9)) for _ in range(2)] == [28, 8]
    for path in tmp_path.glob("cifar*/data_batch_1"):
        path.write_bytes(path.with_name("data_batch_2").read_bytes())
    assert [read(Counting(width=9)) for _ in range(2)] == [28, 8]
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    write_cifar10(tmp_path, 15)
    assert [read(Counting(width=9)) for _ in range(2)] == [15 + 8, 8]


def test_interrupted_write(write, tmp_path, monkeypatch):
    """What was interrupted while it kept the features is not taken for them."""
    write("mnist")
    config = Config(dataset="mnist", root=str(tmp_path), size=8, cache=str(tmp_path / "cache"))

    def half(file, array, save=np.save):
        save(file, array[:7])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "save", half)
        load_images(config, "train", Counting())
    for expected in (20, 8):
        clip = Counting()
        assert load_images(config, "train", clip).features.shape == (20, 12) and clip.asked == expected
    assert not list((tmp_path / "cache").glob("*.part"))
