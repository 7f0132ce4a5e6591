"""CLIP: both packages, compared with each other and with what they do themselves, on models with random weights."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import write_cifar10
from PIL import Image

import tclip
from tclip import Clip, UserError, load_clip

open_clip = pytest.importorskip("open_clip")
TEXTS = ["a photo of a dog.", "a photo of a cat.", "word " * 200]  # the last is longer than CLIP reads
TINY = dict(layers=1, width=64)  # OpenAI's models have heads of width 64


def photos():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, shape, np.uint8)) for shape in ((90, 67, 3), (8, 8, 3), (40, 50))]


@pytest.fixture
def openai(tmp_path, monkeypatch):
    """The package `clip`, whose ViT-B/32, for open_clip as well, is now a tiny model with random weights."""
    clip = pytest.importorskip("clip", reason="no package clip", exc_type=ImportError)
    if not hasattr(clip, "tokenize"):
        pytest.skip("the installed package clip is not OpenAI's")
    torch.manual_seed(0)
    model = clip.model.CLIP(16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)
    model.logit_scale.data.fill_(1.75)
    file = tmp_path / "weights.pt"
    torch.save({name: x.half().float() for name, x in model.state_dict().items()}, file)  # OpenAI's are float16
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, patch_size=16, **TINY))
    config |= dict(text_cfg=dict(context_length=77, vocab_size=49408, heads=1, **TINY))
    monkeypatch.setattr(clip.clip, "_download", lambda *_: str(file))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", config)
    return clip


def answers(clip):
    images = clip.encode_images(torch.stack([clip.prepare(image) for image in photos()]))
    for rows in (images, texts := clip.encode_texts(TEXTS)):
        assert rows.dtype == torch.float32 and rows.shape == (3, 16)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    return images, texts, torch.tensor(clip.temperature)


def test_packages_agree(openai, monkeypatch):
    """By `import clip` and by open_clip, ViT-B/32 gives the features of that package itself; the temperature is the
    model's own."""
    model, prepare = openai.load("ViT-B/32", "cpu")
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(image) for image in photos()]))
        texts = model.encode_text(openai.tokenize(TEXTS, truncate=True))
    expected = F.normalize(images, dim=1), F.normalize(texts, dim=1), torch.tensor(np.exp(-1.75).astype(np.float32))
    assert Clip("ViT-B/32").model.__module__ == "clip.model"
    torch.testing.assert_close(answers(Clip("ViT-B/32")), expected)
    for other in (None, types.ModuleType("clip")):  # `import clip` fails, or is another program of that name
        monkeypatch.setitem(sys.modules, "clip", other)
        assert Clip("ViT-B/32").model.__module__.startswith("open_clip")
        torch.testing.assert_close(answers(Clip("ViT-B/32")), expected, rtol=0, atol=1e-5)


def test_names(openai, monkeypatch):
    """Every name of OpenAI's is loaded by the package `clip`, else by open_clip, with QuickGELU; other models have the
    activation with which they were trained."""
    asked, model = [], Clip().model
    monkeypatch.setattr(openai, "load", lambda name, device: asked.append(name) or (model, None))
    create = lambda arch, tag, force_quick_gelu: asked.append((arch, tag, force_quick_gelu)) or (model, 0, 0)  # noqa: E731
    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    names = openai.available_models()
    for package in (openai, None):
        monkeypatch.setitem(sys.modules, "clip", package)
        [load_clip(name) for name in names]
    assert len(names) == 9 and asked[:9] == names
    assert set(asked[9:]) <= {(*pair, True) for pair in open_clip.list_pretrained() if pair[1] == "openai"}
    assert [arch[:5] for arch, *_ in asked[9:]] == [name.replace("/", "-")[:5] for name in names]
    [load_clip(f"ViT-B-32:{tag}") for tag in ("laion400m_e32", "laion2b_s34b_b79k")]
    assert asked[18:] == [("ViT-B-32", "laion400m_e32", True), ("ViT-B-32", "laion2b_s34b_b79k", False)]


def test_file_of_weights(tiny_clip, monkeypatch, tmp_path):
    """arch:FILE is open_clip's model of that architecture with those weights. It names a data set, in its own words
    and at its own temperature."""
    model, _, prepare = open_clip.create_model_and_transforms("tiny", tiny_clip.removeprefix("tiny:"))
    with torch.no_grad():
        images = model.eval().encode_image(torch.stack([prepare(image) for image in photos()]))
        texts = model.encode_text(open_clip.tokenize(TEXTS))
    expected = F.normalize(images, dim=1), F.normalize(texts, dim=1), 1 / model.logit_scale.detach().exp()
    torch.testing.assert_close(answers(Clip(tiny_clip)), expected)
    write_cifar10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    config = tclip.Config(dataset="cifar10", root=str(tmp_path), clip=tiny_clip, size=8, cache="none")
    _, heldout, classes = tclip.read_dataset(config)
    templates = tclip.DATASETS["cifar10"]["templates"]
    rows = [model.encode_text(open_clip.tokenize([t.replace("{}", name) for t in templates])) for name in classes]
    prompts = F.normalize(F.normalize(torch.stack(rows), dim=2).mean(1), dim=1)
    expected = (heldout.features @ prompts.T * model.logit_scale.exp()).softmax(1)
    torch.testing.assert_close(heldout.probs, expected.detach(), rtol=0, atol=1e-4)


def test_offline():
    """The offline CLIP names digits; asked for words that it never learned it says so, and does not guess."""
    _, images, _ = tclip.read_dataset(tclip.Config(size=8, clip="offline", cache="none"))
    assert tclip.score(images.probs, images.truth)["accuracy"] > 0.7
    with pytest.raises(UserError, match="knows digits only.*dog"):
        Clip().encode_texts(["a photo of a dog."])


@pytest.mark.parametrize("name", ["ViT-B/31", "ViT-B-32:laion3b", "ViT-B-31:laion2b_s34b_b79k", "ViT-B-32:no.pt", ""])
def test_unknown_names(name):
    with pytest.raises(UserError, match=f"^--clip {name}: there is .*ViT-B/32.*arch:tag"):
        load_clip(name)
