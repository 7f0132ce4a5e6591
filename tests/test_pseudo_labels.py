"""Pseudo-labels: the zero-shot arithmetic on real features of OpenAI's CLIP, in numpy and against known accuracies."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from tclip import EnsembleLabels, text_classifier, zero_shot_probs

sys.path.insert(0, str(ROOT / "tutorials"))
import real_answers  # noqa: E402

WHU_RS19 = {"RN50": 71.5, "ViT-B-32": 81.3, "ViT-L-14": 85.5}  # %, published with the features (RS-TransCLIP)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("model", WHU_RS19)
def test_real_features(model, reference):
    """107 prompts, 19 classes, 1005 satellite images: both functions are numpy's arithmetic, and as right as known.
    Ensemble labels from the features are more often right, before any training, by equal classes and by 10:1."""
    data = np.load(reference("whurs19_openai_clip_features.npz"))
    images, texts = (data[f"{kind}_{model}"].astype(np.float64) for kind in ("images", "texts"))
    prompt = {text: i for i, text in enumerate(data["prompts"])}

    def encode_texts(captions):  # "a photo of a|3" stands for this prompt and class 3
        keys = [caption.split("|") for caption in captions]
        return F.normalize(torch.tensor(np.stack([texts[prompt[text], int(c)] for text, c in keys])).float(), dim=1)

    weights = text_classifier(encode_texts, [str(c) for c in range(19)], [f"{text}|{{}}" for text in data["prompts"]])
    np.testing.assert_allclose(weights, unit(unit(texts).mean(0)), atol=1e-6)

    probs = zero_shot_probs(F.normalize(torch.tensor(images).float(), dim=1), weights)
    logits = unit(images) @ unit(unit(texts).mean(0)).T / 0.01
    expected = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(probs, expected / expected.sum(1, keepdims=True), atol=1e-4)
    assert probs.dtype == torch.float32
    assert round(100 * (probs.argmax(1).numpy() == data["labels"]).mean(), 1) == WHU_RS19[model]
    images, truth = F.normalize(torch.tensor(images).float(), dim=1), torch.tensor(data["labels"])
    assert_mended(probs, images, truth)


def assert_mended(probs, images, truth):
    """Labels from the features are more often right than the answers, by equal classes and by 10:1."""
    for seed, ratio in ((0, 1.0), (0, 10.0), (1, 10.0), (2, 10.0)):
        generator = torch.Generator().manual_seed(seed)
        place = torch.randperm(19, generator=generator)[truth]  # of an image's class among the sizes
        kept = torch.rand(len(truth), generator=generator) < ratio ** (-place / 18)
        said = probs[kept], EnsembleLabels(probs[kept], images[kept]).table
        before, after = ((x.argmax(1) == truth[kept]).float().mean() for x in said)
        assert after > before + 0.02


def test_real_clip():
    """The same with the small file of ViT-B/32 that lies in the repository, as the tutorials read it. Its first choices
    alone, as if certain, are mended, too."""
    _, real = pytest.importorskip("plots", reason="IPython is not installed").real_clip()
    assert round(100 * (real.probs.argmax(1) == real.truth).float().mean().item(), 1) == WHU_RS19["ViT-B-32"]
    for probs in (real.probs, F.one_hot(real.probs.argmax(1)).float()):
        assert_mended(probs, real.features, real.truth)


def test_real_answers(reference, tmp_path, monkeypatch):
    """The small file that the tutorials read is what their script makes of the public ones, with its licence beside."""
    root = reference("whurs19_openai_clip_features.npz").parent
    reference("eurosat_gpt4v.csv")
    kept = dict(np.load(ROOT / "tutorials/real_answers.npz"))
    monkeypatch.setattr(real_answers, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["real_answers.py", "--root", str(root)])
    real_answers.main()
    made = dict(np.load(tmp_path / "real_answers.npz"))
    assert kept.keys() == made.keys() and all(np.array_equal(kept[name], made[name]) for name in kept)
    assert (ROOT / "tutorials/real_answers_LICENSE.txt").read_text().count("MIT License") == 2


def test_class_names_with_braces():
    """Only "{}" is replaced: braces in a class name or elsewhere in a prompt are no format fields."""
    asked = []
    encode_texts = lambda captions: asked.extend(captions) or torch.eye(2)[: len(captions)]  # noqa: E731
    weights = text_classifier(encode_texts, ["a {b}", "{0}", "}{", "100 %s"], ["<{}>", "{x} {}"])
    assert asked == ["<a {b}>", "{x} a {b}", "<{0}>", "{x} {0}", "<}{>", "{x} }{", "<100 %s>", "{x} 100 %s"]
    torch.testing.assert_close(weights, torch.full((4, 2), 0.5**0.5))
