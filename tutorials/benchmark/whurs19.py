"""Labels only, no training: what CLIP's own image features make of its zero-shot answers, whatever the class sizes.

WHU-RS19: 1,005 aerial images of 19 classes, named by OpenAI's CLIP RN50, ViT-B/32 and ViT-L/14. METHODS, and
STUDY, tclip's with one thing changed, take the answers (N, C) and the unit features (N, D), and give labels (N, C).
"""

from functools import partial

import baselines
import numpy as np
import torch
import torch.nn.functional as F
from suites import arrays_of, long_tailed, need

import tclip

WHURS19 = (
    "real features of OpenAI's CLIP of WHU-RS19 (github.com/elkhouryk/RS-TransCLIP at a766b4d): labels (1005,), "
    "classes, prompts, and for RN50, ViT-B-32 and ViT-L-14 images_MODEL (1005, D) and texts_MODEL (107, 19, D)"
)
MODELS = {"RN50": "RN50", "ViT-B/32": "ViT-B-32", "ViT-L/14": "ViT-L-14"}
RATIOS, DRAWS = (1, 10, 50), (1, 2, 3)


def zero_shot(probs, features):
    """The answers as they are."""
    return probs


def balance(probs, features):
    """The answers with equally frequent classes."""
    return baselines.balanced(probs)


def log_gaussians(features, weights, floor):
    """log N(x_i; mean_c, one diagonal covariance) but what all classes share: (N, C). weights (N, C): who is in c."""
    mass = weights.sum(0).clamp_min(1e-6)[:, None]  # (C, 1)
    means = weights.T @ features / mass  # (C, D)
    spread = weights.T @ features.square() - mass * means.square()  # (C, D), within the classes
    precision = 1 / (spread.sum(0) / weights.sum() + floor)  # (D,)
    return (features * precision) @ means.T - (means.square() @ precision) / 2  # x' x / 2 is the same for all classes


def gaussians(probs, features, rounds=20):
    """EM of a Gaussian a class with one diagonal covariance, each image's prior being its answer."""
    labels = probs
    for _ in range(rounds):
        labels = (probs.log() + log_gaussians(features, labels, floor=1e-6)).softmax(1)
    return labels


def trans_clip(probs, features, rounds=10, neighbours=3, confident=8):
    """TransCLIP, Zanella et al. 2024, "Boosting Vision-Language Models with Transduction", zero-shot.

    Gaussians with one diagonal covariance; a Laplacian term by which near images share a label; and a divergence that
    holds each image to its answer. Blocks in turn: labels (5 inner steps), means, covariance. Means begin with the most
    confident images of each class, the covariance with 1 / D. Written anew; as in the authors' code, the Gaussians'
    log-likelihood counts a fiftieth, the affinity is halved over both directions, and means are unit vectors.
    """
    cosines = (features @ features.T).fill_diagonal_(-1)  # (N, N)
    near = cosines.topk(min(neighbours, len(features) - 1), 1)
    affinity = torch.zeros_like(cosines).scatter_(1, near.indices, near.values)
    affinity = (affinity + affinity.T) / (2 * neighbours)
    best = probs.topk(min(confident, len(probs)), 0).indices  # (8, C)
    means = F.normalize(features[best].mean(0), dim=1)  # (C, D)
    variance = torch.full_like(features[0], 1 / features.shape[1])  # (D,)
    labels = probs
    for _ in range(rounds + 1):
        log_likelihood = (features / variance) @ means.T - (means.square() / variance).sum(1) / 2  # (N, C)
        for _ in range(5):
            labels = (probs.log() + log_likelihood / 50 + affinity @ labels).softmax(1)
        sums, mass = labels.T @ features, labels.sum(0)[:, None]  # (C, D), (C, 1)
        means = F.normalize(sums, dim=1)
        spread = features.square().sum(0) - 2 * (means * sums).sum(0) + (mass * means.square()).sum(0)  # (D,)
        variance = (spread / len(features)).clamp_min(1e-6)
    return labels


def tclip_start(probs, features, rule=None, **settings):
    """tclip's labels before training. rule, a dict by name: functions or classes in place of its own."""
    with baselines.exchanged(rule or {}):
        return tclip.EnsembleLabels(probs, features, **settings).targets(slice(None))


def without_teacher(answers, near, mass, trust, sharpness, rule=tclip.bayes_rule):
    """bayes_rule() of the neighbourhood alone: the teacher's words are where the labels begin, and nothing more."""
    return rule(answers, near, mass, 0 * trust, sharpness)


METHODS = {
    "zero-shot": zero_shot,
    "balance": balance,
    "EM of Gaussians": gaussians,
    "TransCLIP": trans_clip,
    "tclip's labels": tclip_start,
}

STUDY = {
    "tclip's labels": tclip_start,
    "one round": partial(tclip_start, rule=dict(EnsembleLabels=baselines.OneRound)),
    "hard answers": lambda probs, features: tclip_start(baselines.hard(probs), features),
    "without the teacher's word": partial(tclip_start, rule=dict(bayes_rule=without_teacher)),
    "without the mass": partial(tclip_start, rule=dict(bayes_rule=baselines.without_mass)),
    "without the prior": partial(tclip_start, rule=dict(bayes_rule=baselines.without_prior)),
    **{
        f"sharpness {s}": partial(tclip_start, rule=dict(verdict=baselines.judged(sharpness=s)))
        for s in (0.5, 1.0, 2.0)
    },
    **{f"label neighbours {k}": partial(tclip_start, neighbours=k) for k in (5, 10, 20, 40)},
    "features of other images": lambda probs, features: tclip_start(probs, features.roll(len(features) // 2, 0)),
}


def read(root):
    """A dict model -> (answers (N, C), unit features (N, D)), and the truth (N,)."""
    saved = arrays_of(need(root, "whurs19_openai_clip_features.npz", WHURS19))
    said = {}
    for name, key in MODELS.items():
        images, prompts = (torch.from_numpy(saved[f"{what}_{key}"].astype(np.float32)) for what in ("images", "texts"))
        images, texts = F.normalize(images, dim=1), F.normalize(F.normalize(prompts, dim=2).mean(0), dim=1)
        said[name] = tclip.zero_shot_probs(images, texts), images
    return said, torch.from_numpy(saved["labels"])


def rows(root, methods=METHODS):
    """A row (dict) for each ratio of class sizes, draw, model and method, with the accuracies."""
    said, truth = read(root)
    for ratio in RATIOS:
        for seed in DRAWS if ratio > 1 else (0,):
            kept = long_tailed(truth, ratio, seed) if ratio > 1 else torch.arange(len(truth))
            for model, (probs, features) in said.items():
                for method in methods:
                    torch.manual_seed(seed)
                    labels = methods[method](probs[kept], features[kept])
                    right = tclip.score(labels, truth[kept])
                    worst = min(share for share in right["per_class"] if share is not None)
                    case = dict(suite="whurs19", method=method, classes=f"{ratio} : 1", seed=seed, model=model)
                    yield case | dict(images=len(kept), labels=right["accuracy"], worst_class=worst)


def table(rows):
    """The rows in Markdown: accuracy in %, mean over models and draws, a column for each ratio."""
    across = [f"{ratio} : 1" for ratio in RATIOS]
    lines = ["| | " + " | ".join(across) + " |", "|---" * (1 + len(across)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        right = [[float(r["labels"]) for r in rows if (r["method"], r["classes"]) == (method, c)] for c in across]
        lines.append(f"| {method} | " + " | ".join(f"{100 * sum(x) / len(x):.1f}" for x in right) + " |")
    return "\n".join(lines)
