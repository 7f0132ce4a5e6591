"""Pseudo-labels: zero-shot arithmetic on OpenAI's real features, and the teacher against both CLIP packages."""

import shutil
import sys
import types
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import tclip
from tclip import Teacher, UserError, load_clip, square, text_classifier, zero_shot_probs

WHU_RS19 = {"RN50": 71.54, "ViT-B-32": 81.29, "ViT-L-14": 85.47}  # published with the features
DIGITS = tclip.DATASETS["digits"]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def photos():
    """Real images: two photos of 640 x 427, one of them turned upright, an odd cut of it, and two grey digits of 8."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    digits = [Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in load_digits().images[:2]]
    return [china, flower.transpose(Image.Transpose.ROTATE_90), flower.crop((7, 3, 338, 202)), *digits]


@pytest.mark.parametrize("model", WHU_RS19)
def test_real_features(model, reference):
    """text_classifier() and zero_shot_probs() are numpy's arithmetic, and reach the accuracy that is known."""
    data = np.load(reference("whurs19_openai_clip_features.npz"))
    images, texts = (data[f"{kind}_{model}"].astype(np.float64) for kind in ("images", "texts"))
    rows = {(prompt, name): texts[i, j] for i, prompt in enumerate(data["prompts"]) for j, name in enumerate(range(19))}

    def encode_texts(captions):  # 'a photo of a|3' stands for the features of this prompt and class 3
        keys = [caption.split("|") for caption in captions]
        return F.normalize(torch.tensor(np.stack([rows[p, int(c)] for p, c in keys])).float(), dim=1)

    templates = [prompt + "|{}" for prompt in data["prompts"]]
    weights = text_classifier(Teacher(None, None, encode_texts), [str(c) for c in range(19)], templates)
    np.testing.assert_allclose(weights, unit(unit(texts).mean(0)), atol=1e-6)

    probs = zero_shot_probs(F.normalize(torch.tensor(images).float(), dim=1), weights)
    logits = unit(images) @ unit(unit(texts).mean(0)).T / 0.01
    expected = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probs, expected / expected.sum(1, keepdims=True), atol=1e-4)
    assert probs.dtype == torch.float32
    assert round(100 * (probs.argmax(1).numpy() == data["labels"]).mean(), 2) == WHU_RS19[model]


def test_temperature():
    """Half the cosine at half the temperature is the same; a high temperature ends in the uniform distribution."""
    images, texts = (F.normalize(torch.randn(n, 6, generator=torch.Generator().manual_seed(n)), dim=1) for n in (5, 3))
    torch.testing.assert_close(zero_shot_probs(images, texts, 0.1), zero_shot_probs(images * 2, texts, 0.2))
    torch.testing.assert_close(zero_shot_probs(images, texts, 1e6), torch.full((5, 3), 1 / 3), rtol=0, atol=1e-5)
    assert zero_shot_probs(images.half(), texts.half()).dtype == torch.float32


def test_class_names_with_braces():
    """Only "{}" is replaced: braces in a class name or elsewhere in a prompt are no format fields."""
    asked = []

    def encode_texts(captions):
        asked.extend(captions)
        return torch.eye(2)[: len(captions)]

    weights = text_classifier(Teacher(None, None, encode_texts), ["a {b}", "{0}", "}{", "100 %s"], ["<{}>", "{x} {}"])
    assert asked == ["<a {b}>", "{x} a {b}", "<{0}>", "{x} {0}", "<}{>", "{x} }{", "<100 %s>", "{x} 100 %s"]
    torch.testing.assert_close(weights, torch.full((4, 2), 0.5**0.5))


def package_transform(package, size):
    if package == "clip":
        return sys.modules["clip.clip"]._transform(size)
    return pytest.importorskip("open_clip").image_transform(size, is_train=False)


def normalised(image, size):
    """square() with OpenAI's normalisation, as the teacher does it."""
    mean, std = np.array([(0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)])
    pixels = square(image, size)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, size, size)
    return (pixels.double() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("size", [32, 224, 225])
def test_preprocess(clip_package, size):
    """square() is the packages' own preprocessing, to the pixel, for wide, tall, odd and tiny grey images."""
    transform = package_transform(clip_package, size)
    for image in photos():
        torch.testing.assert_close(normalised(image, size).float(), transform(image), rtol=0, atol=1e-5)


def test_preprocess_satellite_images(clip_package, reference):
    """The same for real EuroSAT files, one of each class."""
    transform = package_transform(clip_package, 224)
    with zipfile.ZipFile(reference("eurosat.zip")) as archive:
        firsts = [name for name in archive.namelist() if name.endswith("_1.jpg")]
        assert len(firsts) == 10
        for name in firsts:
            image = Image.open(BytesIO(archive.read(name)))
            torch.testing.assert_close(normalised(image, 224).float(), transform(image), rtol=0, atol=1e-5)


def test_offline_teacher(clip_package):
    """load_clip("offline") is the package's own model of that file: image and text features, float32 unit rows."""
    state = torch.load(tclip.OFFLINE_CLIP, weights_only=True)
    if clip_package == "clip":
        import clip

        model, tokenize = clip.model.build_model(state).float(), clip.tokenize
    else:
        import open_clip

        model = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float().eval()
        tokenize = open_clip.tokenize
    teacher = load_clip("offline")
    pixels = torch.stack([teacher.prepare(image) for image in photos()])
    texts = ["a photo of the digit seven.", "the handwritten digit two."]
    with torch.no_grad():
        images = model.encode_image(torch.stack([package_transform(clip_package, 32)(image) for image in photos()]))
        captions = model.encode_text(tokenize(texts))
    for ours, theirs in ((teacher.encode_images(pixels), images), (teacher.encode_texts(texts), captions)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, F.normalize(theirs, dim=1), rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(ours)))


def test_packages_agree(monkeypatch):
    """Through `clip` and through open_clip, the offline teacher says the same."""
    if not hasattr(pytest.importorskip("clip", reason="no package clip", exc_type=ImportError), "tokenize"):
        pytest.skip("the installed package clip is not OpenAI's")
    pixels = torch.stack([square(image, 32) for image in photos()])

    def ask():
        teacher = load_clip("offline")
        return teacher.encode_images(pixels), text_classifier(teacher, DIGITS.classes, DIGITS.templates)

    images, texts = ask()
    monkeypatch.setitem(sys.modules, "clip", None)
    for ours, theirs in zip((images, texts), ask()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(10))


def test_other_program_named_clip(monkeypatch):
    """PyPI's "clip" is another program: open_clip takes over."""
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    assert load_clip("offline").prepare(photos()[0]).shape == (3, 32, 32)


def test_state_dict_file(clip_package, tmp_path):
    """A state_dict of OpenAI's format is loaded from any path."""
    file = shutil.copy(tclip.OFFLINE_CLIP, tmp_path / "my clip.pt")
    pixels = square(photos()[0], 32)[None]
    assert torch.equal(load_clip(str(file)).encode_images(pixels), load_clip("offline").encode_images(pixels))


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, {}, [torch.zeros(2)], torch.zeros(3), 7])
def test_no_clip_in_the_file(clip_package, tmp_path, content):
    """Any other file of tensors is refused by name."""
    file = tmp_path / "other.pt"
    torch.save(content, file)
    with pytest.raises(UserError, match="other.pt"):
        load_clip(str(file))


def test_offline_knows_digits_only():
    """The offline CLIP never learned other words: asking them is an error, not a random answer."""
    with pytest.raises(UserError, match="digit"):
        load_clip("offline").encode_texts(["a photo of a dog."])


def stand_in(monkeypatch, asked):
    """In place of open_clip's create_model: the small offline CLIP. What was asked for goes into `asked`."""
    open_clip = pytest.importorskip("open_clip")
    state = torch.load(tclip.OFFLINE_CLIP, weights_only=True)

    def create_model(model_name, pretrained=None, **settings):
        asked.update(settings, model_name=model_name, pretrained=pretrained)
        return open_clip.model.build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32)

    monkeypatch.setattr(open_clip, "create_model", create_model)


@pytest.mark.parametrize(
    "name, quick", [("ViT-B-32:laion400m_e32", True), ("ViT-B-32:openai", True), ("ViT-B-32:laion2b_s34b_b79k", False)]
)
def test_quick_gelu(monkeypatch, name, quick):
    """Weights trained with QuickGELU get it, others do not (open_clip itself only warns)."""
    asked = {}
    stand_in(monkeypatch, asked)
    load_clip(name)
    assert (asked["model_name"], asked["pretrained"]) == tuple(name.split(":"))
    assert asked["force_quick_gelu"] == quick and asked["precision"] == "fp32"


def test_tokenizer_is_missing(monkeypatch):
    """A model whose tokenizer needs a package or a download that is not there: one line."""
    asked = {}
    stand_in(monkeypatch, asked)

    def get_tokenizer(name):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr("open_clip.get_tokenizer", get_tokenizer)
    with pytest.raises(UserError, match="ViT-B-16-SigLIP:webli.*transformers"):
        load_clip("ViT-B-16-SigLIP:webli")


def test_normalisation_of_the_model(monkeypatch):
    """A model with its own mean and deviation is fed by these, not by OpenAI's."""
    pytest.importorskip("open_clip")
    fed = []

    import open_clip

    class Visual:
        mean, std = (0.5, 0.25, 0.5), (0.5, 0.5, 0.25)
        preprocess_cfg = dict(size=(16, 16), mean=mean, std=std, interpolation="bilinear", resize_mode="squash")
        state_dict = staticmethod(dict)

    class Model(torch.nn.Module):
        visual = Visual()

        def encode_image(self, x):
            fed.append(x)
            return x.flatten(1)

    monkeypatch.setattr("open_clip.create_model", lambda *_, **__: Model())
    teacher = load_clip("ViT-B-32:laion2b_s34b_b79k")
    wide = photos()[0].crop((0, 0, 90, 50))
    theirs = open_clip.image_transform(
        16, False, Visual.mean, Visual.std, resize_mode="squash", interpolation="bilinear"
    )
    teacher.encode_images(teacher.prepare(wide)[None])
    torch.testing.assert_close(fed[0][0], theirs(wide))
