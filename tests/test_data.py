"""The data sets and the reading of their images, by torchvision's own classes on small files of their formats."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_cifar10
from PIL import Image
from sklearn.datasets import load_digits

from tclip import DATASETS, Config, UserError, load_images, square


class Counting:
    """In place of a Clip: an image's features are 12 of its pixels, plus `shift`; counts the images it is asked for."""

    def __init__(self, shift=0.0, width=12):
        self.name, self.shift, self.width, self.asked = "ViT-B/32", shift, width, 0

    def prepare(self, image):
        return square(image, 12).float() / 255

    def encode_images(self, views):
        self.asked += len(views)
        return F.normalize(views.flatten(1)[:, : self.width] + 0.1 + self.shift, dim=1)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with small files of CIFAR-10."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    write_cifar10(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_reading(name, cifar10):
    """Pixels, labels, features and names of both splits belong together, and are those of the images themselves, as
    scikit-learn and torchvision have them. Of the digits a fifth is held out, of each class, always the same."""
    digits, splits, recipe = load_digits(), [], DATASETS[name]
    for split in ("train", "test"):
        items = torchvision.datasets.CIFAR10(cifar10, split == "train")
        if name == "digits":
            gray = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in digits.images]
            items = list(zip(gray, digits.target))
        for _ in range(2):
            clip = Counting()
            images = load_images(Config(dataset=name, root=cifar10, size=8, cache="none"), split, clip)
            splits.append([int(i) for i in images.names])
        assert images.pixels.dtype == torch.uint8 and clip.asked == len(images.pixels) == len(images.names)
        for i, pixels, truth, features in zip(splits[-1], images.pixels, images.truth, images.features):
            image, label = items[i]
            assert torch.equal(pixels, square(image, 8)) and truth == label
            torch.testing.assert_close(features, clip.encode_images(clip.prepare(image)[None])[0])
    train, train_again, test, test_again = splits
    assert train == train_again and test == test_again
    if name == "digits":
        assert sorted(train + test) == list(range(1797)) and test == sorted(test)
        np.testing.assert_allclose(np.bincount(digits.target[test]), np.bincount(digits.target) / 5, atol=1)
    else:
        assert train == test == list(range(20))
    assert len(set(recipe["classes"])) == 10 and all(t.count("{}") == t.count("{") == 1 for t in recipe["templates"])
    assert len(set(recipe["templates"])) == dict(digits=3, cifar10=18)[name]  # as many as OpenAI has for both
    Config(dataset=name, **recipe["settings"])


@pytest.mark.parametrize("size", [8, 32, 33])
def test_square_is_clips_preprocessing(size):
    """square() is open_clip's preprocessing, to the pixel, for wide, tall, odd and grey images."""
    transform = pytest.importorskip("open_clip").image_transform(size, False, mean=(0,) * 3, std=(1,) * 3)
    noise = np.random.default_rng(0).integers(0, 256, (90, 67, 3), np.uint8)
    for pixels in (noise, noise[:50], noise[..., 0], noise[:9, :8, 0]):
        image = Image.fromarray(pixels)
        torch.testing.assert_close(square(image, size) / 255, transform(image), rtol=0, atol=1e-6)


def test_no_network(offline, tmp_path, monkeypatch):
    """One line, with the data set and the folder to bring from elsewhere. What nobody foresaw keeps its traceback."""
    config = Config(dataset="cifar10", root=f"{tmp_path}/data")
    with pytest.raises(UserError, match=f"^no cifar10: [^\n]*copy {tmp_path}/data from elsewhere$"):
        load_images(config, "train", Counting())
    for fault, told in ((RuntimeError("not found or corrupted."), UserError), (KeyError(1), KeyError)):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *_, fault=fault, **__: (_ for _ in ()).throw(fault))
        with pytest.raises(told):
            load_images(config, "train", Counting())


def test_features_are_kept(cifar10, tmp_path):
    """A file for each data set, split and model: a second run asks CLIP for the first eight images only. Another model
    of that name, of another width even, other images, or fewer, are noticed."""
    config = Config(dataset="cifar10", root=cifar10, size=8, cache=str(tmp_path / "deep/cache"))

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
