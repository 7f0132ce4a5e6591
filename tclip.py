"""tclip: train a small classifier from unlabeled images and class names alone.

CLIP names every image once. Its answers are noisy, and for some classes nearly always wrong. A small network is
trained *from scratch* on them with a class-conditional contrastive loss and ensemble labels. The aim is a student that
is better than its teacher and needs no CLIP.

    python tclip.py                                # handwritten digits: offline, a minute or two on a CPU
    python tclip.py --dataset cifar10              # CIFAR-10 named by OpenAI's CLIP ViT-B/32, for a GPU
    python tclip.py --images photos --classes "cat,dog,neither"        # a folder of your own
    torchrun --nproc_per_node=8 tclip.py --dataset cifar10             # the same on eight GPUs
    python tclip.py --resume runs/photos           # go on where a run was interrupted
    python tclip.py --predict more --model runs/photos/model.pt        # use the student: no CLIP any more
    python tclip.py --help                         # all settings

Method: Huang, Chen, Yang, Xie, Pu, Zhuang, "Transductive CLIP with Class-Conditional Contrastive Learning",
ICASSP 2022, arXiv 2206.06177. The equations, weights and schedule are our reading of it: see README.md.

The method: settings / pseudo-labels / class-conditional contrastive loss / ensemble labels / augmentation / student /
training / prediction and evaluation. Around it: several devices / images / teachers / files / command line.
A rank is one of the processes that torchrun starts, see "Several devices"; without torchrun there is one.
text_classifier, zero_shot_probs, class_conditional_contrastive_loss and EnsembleLabels (with the five functions above
it) need torch and nothing else of this file: copy them out alone.
"""

import argparse
import csv
import difflib
import hashlib
import json
import logging
import math
import os
import re
import signal
import sqlite3
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and leaves with exit code 2."""


# ======================================================================================================================
# Settings: each field is a flag of the command line. Five that are None by default come from the data set's entry in
# DATASETS, or for a folder from OWN_IMAGES; all other defaults are the same for every data set.
# ======================================================================================================================


def setting(default, help, choices=None, low=None, high=None):
    """A field of Config with its line of --help and the values it may take."""
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


@dataclass
class Config:
    """All settings of a run. Out-of-range values raise UserError."""

    dataset: str = setting("digits", "name in the table DATASETS")
    root: str = setting("data", "folder where torchvision keeps its data sets; missing ones are downloaded to it")
    images: str = setting(None, "folder of unlabeled images, in place of --dataset")
    classes: str = setting(None, "class names: separated by commas, or a text file with one a line")
    templates: str = setting(None, 'prompt with {} for the class name, as "a photo of a {}.", or a file, one a line')
    truth: str = setting(None, "csv file (file,label), or the word folders; for evaluation alone")
    strict: bool = setting(False, "stop at the first file that is no readable image")
    memory: float = setting(8.0, "gigabytes of pixels that a set of images may take; more lie on disk", low=0.0)
    clip: str = setting(None, "teacher: ViT-B/32 and the like, arch:tag of open_clip, a state_dict file, or offline")
    pseudo_labels: str = setting(None, "another teacher's answers: .csv (file,label[,confidence]) or .npz, see README")
    cache: str = setting("~/.cache/tclip", "folder that keeps CLIP's image features: CLIP sees an image once")
    no_cache: bool = setting(False, "do not keep CLIP's image features")
    size: int = setting(None, "side of the student's images, in pixels", low=8, high=1024)
    arch: str = setting(None, "student: resnet8, or any resnet of torchvision")
    views: str = setting(None, "augmentation", choices=("photo", "overhead", "street", "writing"))
    epochs: int = setting(40, "passes over the images", low=1)
    batch_size: int = setting(128, "images a step, each seen in two views", low=2)
    lr: float = setting(0.1, "peak learning rate for a batch of 256, scaled linearly with it", low=0.0)
    weight_decay: float = setting(5e-4, "L2 penalty", low=0.0)
    temperature: float = setting(0.5, "of the contrastive loss", low=1e-3)
    c3l_weight: float = setting(1.0, "lambda: weight of the contrastive loss beside cross-entropy", low=0.0)
    positives: str = setting(
        "both", "whom that loss pulls; both: less by class as trust grows", choices=("both", "class", "instance")
    )
    negatives: str = setting("other", "whom it pushes away", choices=("all", "other", "same"))
    label_momentum: float = setting(0.5, "m: share of the ensemble labels kept each epoch", low=0.0, high=1.0)
    class_prior: str = setting(None, "uniform where the classes are about equally frequent", ("uniform", "none"))
    label_neighbours: int = setting(20, "images whose predictions make an ensemble label; 0: only its own", low=0)
    label_sharpness: float = setting(2.0, "s: power of the predictions mixed in, and of the trust", low=0.1, high=10)
    seed: int = setting(0, "makes a run repeat, on the same CPU to the bit", low=0, high=2**32 - 1)
    device: str = setting("auto", "where to train", choices=("auto", "cpu", "cuda", "mps"))
    compile: bool = setting(False, "torch.compile the student: slower to start, faster on a GPU")
    out: str = setting(None, "folder of the results [runs/DATASET, or the next free runs/DATASET-2, ...]")

    def __post_init__(self):
        for f in fields(self):
            value, limits = getattr(self, f.name), f.metadata
            choices, low, high = limits["choices"], limits["low"], limits["high"]
            if value is None:
                continue
            flag = f"--{f.name.replace('_', '-')} {value}"
            if choices and value not in choices:
                raise UserError(f"{flag}: choose from {', '.join(choices)}")
            if f.type is float and not math.isfinite(value):
                raise UserError(f"{flag}: must be finite")
            if low is not None and value < low:
                raise UserError(f"{flag}: must be at least {low}")
            if high is not None and value > high:
                raise UserError(f"{flag}: must be at most {high}")


def nearest(name, known):
    """End of an error message: the known names most like `name`, or all of them."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known))


# ======================================================================================================================
# Pseudo-labels: CLIP names every image once. (The models themselves: section teachers.)
# ======================================================================================================================


def text_classifier(teacher, classes, templates):
    """Zero-shot weights: per class the mean of the unit text embeddings over the templates, made unit again.

    classes: C names. templates: T prompts in which "{}" stands for the name. Returns float (C, D) unit rows.
    Prompt ensembling of Radford et al. 2021, section 3.1.4.
    """
    rows = [teacher.encode_texts([t.replace("{}", name) for t in templates]).mean(0) for name in classes]
    return F.normalize(torch.stack(rows), dim=1)


def zero_shot_probs(image_features, text_features, temperature=0.01):
    """p(class | image) = softmax(cosine / temperature).

    image_features (N, D) and text_features (C, D) are unit rows; temperature 0.01 is CLIP's 1 / exp(logit_scale).
    Returns float32 (N, C). Radford et al. 2021, section 3.1.2.
    """
    return (image_features.float() @ text_features.float().T / temperature).softmax(1)


# ======================================================================================================================
# Class-conditional contrastive loss (C3L)
# ======================================================================================================================


def class_conditional_contrastive_loss(z, targets, temperature=0.5, class_share=1.0, negatives="other"):
    """Class discrimination and instance discrimination in one contrastive loss, conditioned on class.

        L_i = - sum_j w_ij log( exp(s_ij) / sum_k v_ik exp(s_ik) ),    s_ij = <z_i, z_j> / temperature

    where j and k run over all rows but i. w says what is pulled together and v what is pushed apart. Both look at the
    class agreement a_ij = <T_i, T_j>, the chance that i and j share a class by their present labels T; for the other
    view i+ of the same image, a_ii+ = 1.

        w_ij = c a_ij / sum_k a_ik + (1 - c) [j = i+],    c the class_share: 1 pulls by class, 0 by instance

        negatives "all":   v_ik = 1             c = 0: SimCLR (NT-Xent); c = 1: SupCon, with soft labels
                  "other": v_ik = 1 - a_ik      only images of other classes are pushed away
                  "same":  v_ik = a_ik          only classmates are

    but v_ii+ = 1, and in the term of a positive j its own v_ij = 1, as in SimCLR and SupCon: each term is a logarithm
    of a share. train() passes c = 1 - trust.

    z: (2B, D) unit rows; row i and row i + B are the two views of one image. targets: (B, C) on the simplex, without
    gradient. Returns a float32 scalar, finite whatever the classes. Our reading of arXiv 2206.06177; its limits are
    Chen et al. 2020 (SimCLR) and Khosla et al. 2020 (SupCon).
    """
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)  # (2B, 2B), the diagonal
    other_view = own.roll(len(z) // 2, 0)
    with torch.autocast(z.device.type, enabled=False):  # exp(s) needs float32
        s = (z.float() @ z.float().T / temperature).masked_fill(own, -torch.inf)
        agreement = (targets.float() @ targets.float().T).clamp(0, 1).repeat(2, 2)
    by_instance, by_class = other_view.float(), agreement.masked_fill(own, 0).masked_fill(other_view, 1)
    w = torch.lerp(by_instance, by_class / by_class.sum(1, keepdim=True), class_share)  # rows sum to 1
    v = {"all": torch.ones_like(s), "other": 1 - agreement, "same": agreement}[negatives].masked_fill(other_view, 1)

    denominator = (s + v.log()).logsumexp(1, keepdim=True)  # (2B, 1)
    denominator = torch.logaddexp(denominator, s + (1 - v).log())  # (2B, 2B): v_ij raised to 1 in the term of j itself
    ratios = (s - denominator).masked_fill(own, 0)  # log-ratios; the diagonal is no term
    return -(w * ratios).sum(1).mean()


# ======================================================================================================================
# Ensemble labels
# ======================================================================================================================


def everyone(x):
    """The rows of x (n, ...) of all processes that train one student, see "Several devices"; x itself where one does.

    Rank 0's rows come first. n may differ from process to process. Without gradient.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    parts = [x.new_empty(int(n), *x.shape[1:]) for n in sizes]
    parts[torch.distributed.get_rank()] = x.contiguous()
    for source, rows in enumerate(parts):
        torch.distributed.broadcast(rows, source)
    return torch.cat(parts)


def total(x):
    """x of all those processes, added up."""
    return everyone(x[None]).sum(0)


def neighbour_mean(embeddings, values, k, pool=50_000):
    """Mean of `values` over the k nearest images by cosine: (N, C) -> float32 (N, C).

    embeddings: (N, D) unit rows. Up to `pool` images, an image is among its own neighbours; beyond, the neighbours are
    sought among so many random images, which keeps the cost per image flat as N grows.
    """
    images = int(total(torch.tensor(len(values), device=values.device)))  # of all processes
    members = torch.randperm(len(values), device=values.device)[: pool * len(values) // images]
    bank, said = everyone(embeddings[members]).T, everyone(values[members]).float()  # (D, pool), (pool, C)
    means = []
    for rows in embeddings.split(256):  # a block at a time: N x pool cosines would be gigabytes
        near = (rows @ bank).topk(min(k, len(said))).indices  # (256, k)
        means.append(said[near].mean(1))  # (256, k, C) -> (256, C)
    return torch.cat(means)


def balance(probs, iterations=20):
    """The nearest soft labels in which the classes are (nearly) equally frequent: (N, C) -> float32 (N, C).

    A teacher that hardly ever says "seven" means seven more often than it says so. Each class gets a weight, such that
    its column sums to N / C once the rows sum to 1: Sinkhorn and Knopp's optimal transport from images to equally large
    classes, as in self-labelling (Asano et al. 2020) and SwAV (Caron et al. 2020). It reads no truth, but it assumes
    that the classes are about equally frequent: where they are not, leave it out.
    """
    p = probs.float().clamp_min(1e-12)  # zero would stay zero for ever
    weights = torch.ones_like(p[0])
    for _ in range(iterations):
        columns = total(p.T @ (1 / (p @ weights)))  # (C,), the sums that weights have to make equal
        weights = columns.sum() / columns
    return p * weights / (p @ weights)[:, None]


def consensus(q):
    """How often two neighbours of an image name the same class, beyond chance, in [0, 1]: Scott's pi (1955).

    q: (N, C), for each image the mean prediction of its neighbours, or its own.
    """
    n = total(torch.tensor(len(q), device=q.device))
    agree, chance = total(q.square().sum()) / n, (total(q.sum(0)) / n).square().sum()
    return ((agree - chance) / (1 - chance).clamp_min(1e-6)).clamp(0, 1).item()


class EnsembleLabels:
    """Pseudo-labels that follow the student as far as it can be trusted. Once an epoch

        T <- m T + (1 - m) ((1 - w) T0 + w q)

    T0   the teacher's predictions, balanced over the classes
    q    what the student says of an image: its mean prediction over the views that it saw in that epoch (no extra
         forward pass), averaged over the image's nearest neighbours in its embedding, sharpened, and balanced
    w    the trust, one number for all images: w = a^s / (a^s + (1 - a)^s), where a is how far neighbours agree beyond
         chance, by consensus(), and s the sharpness. With s = 2: 1 at a = 1, 1/2 at a = 1/2, 0.06 at a = 1/5

    So at first, and for ever where a student cannot make sense of the images, the labels stay the teacher's.

    The ensembling is our reading of arXiv 2206.06177, kin to temporal ensembling (Laine and Aila 2017). The rest is
    our addition. Neighbours: a wrong label has right ones. Balance: a whole group that is named wrongly shows in the
    size of its class. Sharpening: averages, averaged again each epoch, would fade to grey (MixMatch, Berthelot et al.
    2019). The teacher's share: labels that follow a student which knows less than they do would get worse, and the
    student with them; it is kept as the given labels are in label propagation (Zhou et al. 2004). Sharp trust: where
    neighbours mostly agree, the teacher's share only holds wrong labels back; where they mostly differ, it is needed.

    probs: (N, C), the teacher's predictions. momentum: m, in [0, 1]. neighbours: how many, 0 for none. sharpness: s,
    of the trust, and the power of q. balanced: False where classes are not about equally frequent; nothing is then.
    `table` is T, (N, C), rows on the simplex; `trust` is w of the last epoch.

    Three tables are kept in float16, 6 N C bytes: `start` (T0), `table` and `predictions`. That is 6 GB for a million
    images of 1000 classes, and end_epoch() needs some 16 N C more for a moment. A number is kept to 1 / 2000 of itself.
    """

    def __init__(self, probs, momentum=0.5, neighbours=20, sharpness=2.0, balanced=True):
        self.momentum, self.neighbours, self.sharpness, self.balanced = momentum, neighbours, sharpness, balanced
        self.start = (balance(probs) if balanced else probs).half()  # T0
        self.table, self.trust = self.start.clone(), 0.0
        self.predictions = torch.zeros_like(self.table)  # sums over this epoch's views
        self.embeddings = None

    def targets(self, index):
        """Present labels, float32 (B, C), of the images `index`, int64 (B,)."""
        return self.table[index].float()

    def record(self, index, probs, embeddings):
        """Add predictions (B, C) and unit embeddings (B, D) for one view of each of the images `index`, int64 (B,)."""
        if self.embeddings is None:
            self.embeddings = torch.zeros(len(self.table), embeddings.shape[1], device=self.table.device)
        self.predictions.index_add_(0, index, probs.detach().half())
        self.embeddings.index_add_(0, index, embeddings.detach().float())

    def end_epoch(self):
        """Mix what was recorded into T. Images that were not seen keep their label."""
        if self.embeddings is not None and self.momentum < 1:
            views = self.predictions.sum(1, dtype=torch.float32)  # how many of each image: predictions sum to 1
            seen = views > 0
            q = self.predictions[seen] / views[seen, None]
            if self.neighbours:
                q = neighbour_mean(F.normalize(self.embeddings[seen], dim=1), q, self.neighbours)
            agree = consensus(q)  # one number: image by image, a wrong label among mixed neighbours would stay
            yes, no = agree**self.sharpness, (1 - agree) ** self.sharpness
            self.trust = yes / (yes + no)
            q = (self.sharpness * q.log()).softmax(1)  # to the power s, and rows that sum to 1
            q = balance(q) if self.balanced else q
            q = torch.lerp(self.start[seen].float(), q, self.trust)
            self.table[seen] = torch.lerp(q, self.table[seen].float(), self.momentum).half()
        self.predictions.zero_()
        self.embeddings = None


# ======================================================================================================================
# Augmentation: on the device, and each image with a draw of its own. (torchvision's transforms draw once for a whole
# batch; a contrastive loss would then tell images apart by nothing but the crop.)
# ======================================================================================================================

VIEWS = {  # keyword arguments of augment()
    "photo": dict(area=(0.3, 1.0), flip=0.5, jitter=0.4, gray=0.2),
    "overhead": dict(area=(0.5, 1.0), flip=0.5, rotate=180, jitter=0.2),  # no up or down seen from above; colour tells
    "street": dict(area=(0.5, 1.0), rotate=10, jitter=0.4, gray=0.2),  # writing in photos has no mirror image
    "writing": dict(area=(0.6, 1.3), rotate=15, jitter=0.3, padding="zeros"),  # white on black
}


def augment(pixels, padding="reflection", views=1, **ranges):
    """Random views of each image, in [0, 1]: uint8 (B, 3, H, W) -> float32 (views * B, 3, H, W), on the same device.

    First come the first views of all images, then the second. padding: what lies outside the image, "reflection" or
    "zeros". ranges: see draw_views().
    """
    draw = draw_views(len(pixels), views=views, device=pixels.device, **ranges)
    return apply_views(pixels.repeat(views, 1, 1, 1), draw, padding)


def draw_views(
    n, area=(1.0, 1.0), ratio=(3 / 4, 4 / 3), rotate=0.0, flip=0.0, jitter=0.0, gray=0.0, views=1, device="cpu"
):
    """Random parameters of n images' views, each a float32 tensor (views * n,): all first views, then all second.

    width, height, left, top        a window in shares of the image's sides, as RandomResizedCrop draws it: its area
                                    from `area`, its width / height from `ratio`. Above 1 the image shrinks within it.
    angle                           degrees, counter-clockwise, within +-rotate
    mirrored                        1 with probability `flip`, otherwise 0
    brightness, contrast, saturation  factors within 1 +- jitter; saturation is 0 with probability `gray`

    On a CPU two views are drawn as by two calls.
    """
    numbers = iter(torch.rand(views, 10, n, device=device).transpose(0, 1).flatten(1))  # ten times (views * n,)

    def uniform(low, high):
        return low + (high - low) * next(numbers)

    side = uniform(*area).sqrt()
    stretch = uniform(math.log(ratio[0]) / 2, math.log(ratio[1]) / 2).exp() if area != (1, 1) else torch.ones_like(side)
    width, height = side * stretch, side / stretch
    if area[1] <= 1:
        width, height = width.clamp(max=1), height.clamp(max=1)
    return dict(
        width=width,
        height=height,
        left=next(numbers) * (1 - width),
        top=next(numbers) * (1 - height),
        angle=uniform(-rotate, rotate),
        mirrored=(next(numbers) < flip).float(),
        brightness=uniform(1 - jitter, 1 + jitter),
        contrast=uniform(1 - jitter, 1 + jitter),
        saturation=uniform(1 - jitter, 1 + jitter) * (next(numbers) >= gray),
    )


def apply_views(pixels, draw, padding="reflection"):
    """The views that `draw` describes, see draw_views(): window, rotation, mirror, brightness, contrast, saturation.

    The first three are one bilinear sampling. Each step is torchvision's function of that name, image by image.
    """
    d = {name: value.to(pixels.device) for name, value in draw.items()}
    width, height, angle, sign = d["width"], d["height"], d["angle"].deg2rad(), 1 - 2 * d["mirrored"]
    sin, cos = angle.sin(), angle.cos()
    # Where an output point (x, y) in [-1, 1], y down, comes from: mirror, then rotate, then scale and shift.
    across = width * sign * cos, -width * sin, 2 * d["left"] + width - 1
    down = height * sign * sin, height * cos, 2 * d["top"] + height - 1
    theta = torch.stack(across + down, 1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(theta, pixels.shape, align_corners=False)
    x = F.grid_sample(pixels.float() / 255, grid, padding_mode=padding, align_corners=False)

    brightness, contrast, saturation = (d[name].view(-1, 1, 1, 1) for name in ("brightness", "contrast", "saturation"))
    x = (brightness * x).clamp_(0, 1)
    x = torch.lerp(grayscale(x.mean((2, 3), keepdim=True)), x, contrast).clamp_(0, 1)
    return torch.lerp(grayscale(x), x, saturation).clamp_(0, 1)


def grayscale(x):
    """Colour to gray, (B, 3, H, W) -> (B, 1, H, W), weighted as in torchvision, Pillow and ITU-R 601."""
    red, green, blue = x.split(1, 1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


# ======================================================================================================================
# Student
# ======================================================================================================================


class Student(nn.Module):
    """The network that is trained: forward(x) -> logits (B, C) and unit embeddings (B, embedding_dim).

    x: float (B, 3, H, W) in [0, 1]; normalisation is inside. arch: "resnet8" (0.3 M parameters: one basic block at
    each of 32, 64 and 128 channels, for few or simple images) or any resnet of torchvision. Below 65 px (`size`) those
    get the CIFAR stem: a 3x3 convolution of stride 1 and no max-pool. UserError: unknown arch.
    """

    def __init__(self, arch, num_classes, size=32, embedding_dim=128):
        super().__init__()
        self.size = size
        if arch == "resnet8":
            self.backbone, width = resnet8(size), 128
        else:
            import torchvision  # takes seconds; `import tclip` alone does not

            known = [name for name in torchvision.models.list_models(torchvision.models) if name.startswith("resnet")]
            if arch not in known:
                raise UserError(f"unknown arch {arch!r}; there is: {nearest(arch, ['resnet8', *known])}")
            self.backbone = torchvision.models.get_model(arch)
            width, self.backbone.fc = self.backbone.fc.in_features, nn.Identity()
            if size <= 64:
                self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
                self.backbone.maxpool = nn.Identity()
        self.classifier = nn.Linear(width, num_classes)
        self.projector = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, embedding_dim)
        )

    def forward(self, x):
        h = self.backbone((x - 0.5) / 0.25)  # (B, width)
        return self.classifier(h), F.normalize(self.projector(h).float(), dim=1)


def resnet8(size):
    """Features (B, 128) by a ResNet of three basic blocks (He et al. 2016, section 4.2, n = 1, twice the width).

    From 32 px on its first convolution halves the image: 32 pixels then cost what 16 do.
    """
    from torchvision.models.resnet import BasicBlock, conv1x1

    kernel, stride, padding = (6, 2, 2) if size >= 32 else (3, 1, 1)
    stem = nn.Conv2d(3, 32, kernel, stride, padding, bias=False)
    layers = [stem, nn.BatchNorm2d(32), nn.ReLU(), BasicBlock(32, 32)]
    for width in (32, 64):
        shortcut = nn.Sequential(conv1x1(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width))
        layers.append(BasicBlock(width, 2 * width, stride=2, downsample=shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ======================================================================================================================
# Training
# ======================================================================================================================


@dataclass
class Images:
    """Unlabeled images at the student's size, as one tensor.

    pixels   uint8 (N, 3, H, W), on any device, or a PixelFile
    names    N distinct strings: the path in the folder, or the position in the original data set
    classes  C class names
    truth    int64 (N,), -1 where unknown, or None. For evaluation and the report; train() does not read it
    features float (N, D), the teacher's unit image features, or None where no teacher was given
    """

    pixels: Tensor
    names: list
    classes: list
    truth: Tensor = None
    features: Tensor = None


def train(config, images, probs, out=None, on_epoch=None):
    """Train a student on images.pixels and the teacher's probs (N, C), and on nothing else: images.truth is not read.

    config      a Config as complete() returns it
    out         folder (Path) for checkpoint.pt and metrics.csv, written after each epoch. Where a checkpoint lies there
                already, training goes on from it; on a CPU to the bit as if it had never stopped.
    on_epoch    called after each epoch with its row of metrics.csv (a dict), the student and the EnsembleLabels
    Returns (student, labels). With several ranks, images, probs and labels are those of this rank.
    UserError: the loss is not finite; the checkpoint cannot be read; the batch is smaller than the number of ranks.
    """
    if config.batch_size < ranks():
        raise UserError(f"--batch-size {config.batch_size} is less than one image for each of {ranks()} processes")
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    student = Student(config.arch, len(images.classes), config.size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    rule = config.label_momentum, config.label_neighbours, config.label_sharpness, config.class_prior == "uniform"
    labels = EnsembleLabels(probs.to(device), *rule)
    checkpoint = Checkpoint(config, images, out, student, optimizer, labels)
    history = checkpoint.restore()
    pixels, first_labels = place(images.pixels, device), probs.argmax(1).to(device)
    model = data_parallel(student)
    model = torch.compile(model) if config.compile else model
    longest = max(of_all_ranks([len(pixels)]))  # all ranks take equal steps
    steps = math.ceil(longest / (config.batch_size // ranks()))  # an epoch

    done = len(history)
    with progress("student", "step", config.epochs * steps, done * steps) as bar:
        for epoch in range(done, config.epochs):
            started = time.time()
            # The draws of an epoch depend on no earlier one, and differ from rank to rank.
            torch.manual_seed(config.seed + 1_000_003 * (epoch + 1) + 15_485_863 * rank())
            order = torch.randperm(len(pixels), device=pixels.device)
            order = order[torch.arange(longest, device=pixels.device) % len(order)]  # a shorter one begins anew
            batches = order.tensor_split(steps)
            losses = train_epoch(config, model, optimizer, pixels, labels, epoch, batches, bar)
            if not math.isfinite(losses["loss"]):  # on all ranks alike
                raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {config.lr}")
            for statistic in student.buffers():  # BatchNorm's: from here on the same on all ranks
                statistic.copy_(total(statistic) / ranks())
            labels.end_epoch()
            row = dict(
                epoch=epoch + 1,
                **losses,
                lr=learning_rate(config, (epoch + 1) / config.epochs),
                labels_changed=everyone((labels.table.argmax(1) != first_labels).float()).mean().item(),
                trust=labels.trust,
                seconds=round(time.time() - started, 3),
            )
            bar.set_postfix_str("loss {loss:.3f}, lr {lr:.3f}, labels changed {labels_changed:.1%}".format(**row))
            if on_epoch:
                on_epoch(row, student, labels)
            history.append(row)
            checkpoint.save(history)
    return student.eval(), labels


def train_epoch(config, model, optimizer, pixels, labels, epoch, batches, bar):
    """One pass over the batches, each int64 (B,). Returns a dict: the means of CE(T, p) + lambda C3L and its parts.

    positives="both" pulls by class at first, and by instance as far as the student is trusted (never, if labels are
    fixed). Telling images apart helps where similar ones share a class, and takes from what the network learns of the
    classes where they do not.
    With one process no step waits for the device, as long as the pixels lie on it.
    """
    model.train()
    device, steps = labels.table.device, len(batches)
    class_share = {"class": 1.0, "instance": 0.0, "both": 1 - labels.trust}[config.positives]
    losses = torch.zeros(3, device=device)
    for step, index in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
        batch, index = pixels[index].to(device), index.to(device)  # uint8 (B, 3, H, W)
        views = augment(batch, views=2, **VIEWS[config.views])  # (2B, 3, H, W)
        targets = labels.targets(index)  # (B, C)
        with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
            logits, z = model(views.contiguous(memory_format=torch.channels_last))  # (2B, C), (2B, D)
        cross_entropy = F.cross_entropy(logits.float(), targets.repeat(2, 1))
        c3l = class_conditional_contrastive_loss(
            *whole_batch(z, targets), config.temperature, class_share, config.negatives
        )
        optimizer.zero_grad()
        (cross_entropy + ranks() * config.c3l_weight * c3l).backward()
        optimizer.step()
        labels.record(index.repeat(2), logits.float().softmax(1), z)
        losses += torch.stack([cross_entropy + config.c3l_weight * c3l, cross_entropy, c3l]).detach() / steps
        bar.update()
    return dict(zip(("loss", "cross_entropy", "c3l"), (total(losses) / ranks()).tolist()))


class Checkpoint:
    """What a run needs to go on, in `out`/checkpoint.pt. Labels are found by image name, so any number of ranks can."""

    def __init__(self, config, images, out, student, optimizer, labels):
        self.folder, self.student, self.optimizer, self.labels = out, student, optimizer, labels
        self.own_names, self.names = images.names, of_all_ranks(images.names)
        free = dict(out=None, device="auto", cache="", no_cache=False, memory=0.0)  # these may differ when it goes on
        self.settings = asdict(replace(config, **free)) | dict(classes=images.classes)

    def restore(self):
        """Put back what was saved, where something was. Returns the rows of metrics.csv up to then."""
        file = self.folder and self.folder / "checkpoint.pt"
        there = of_all_ranks([bool(file) and file.exists()])
        if not any(there):
            return []
        if not all(there):
            raise UserError(f"not all processes see {file}: on several machines it must be in a folder that they share")
        state = read_tensors(file)
        with as_user_error(f"{file} is of another run", KeyError, TypeError, ValueError, RuntimeError):
            row = {name: i for i, name in enumerate(state["names"])}
            if state["settings"] != self.settings or row.keys() != set(self.names):
                raise ValueError("its settings or its images are others")
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            own, device = [row[name] for name in self.own_names], self.labels.table.device
            self.labels.start, self.labels.table = (state[key][own].to(device) for key in ("first_labels", "labels"))
            self.labels.trust = state["history"][-1]["trust"]
        return state["history"]

    def save(self, history):
        """Write checkpoint.pt, and metrics.csv with the rows `history`."""
        if not self.folder:
            return
        state = dict(first_labels=everyone(self.labels.start), labels=everyone(self.labels.table), names=self.names)
        state |= dict(student=self.student.state_dict(), optimizer=self.optimizer.state_dict())
        if rank() == 0:
            state |= dict(history=history, settings=self.settings)
            write_csv(self.folder / "metrics.csv", history)  # first: what is cut off between the two is done again
            write_whole(self.folder / "checkpoint.pt", partial(torch.save, state))


def place(pixels, device):
    """The pixels where batches are gathered best: on the device if they take at most half of what is free there."""
    if isinstance(pixels, PixelFile):
        return pixels
    torch.cuda.empty_cache()  # what CLIP left
    fits = device.type != "cuda" or pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2
    return pixels.to(device) if fits else pixels


def learning_rate(config, progress):
    """Linear warm-up in the first twentieth of the run, then a cosine to zero. progress: share of the run done."""
    peak = config.lr * config.batch_size / 256
    return peak * min(progress / 0.05, (1 + math.cos(math.pi * progress)) / 2)


def pick_device(name):
    """torch.device of "auto", "cpu", "cuda" or "mps". UserError: there is none of that kind."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise UserError(f"--device {name}: none found; there is: {', '.join(kind for kind in there if there[kind])}")
    return torch.device(name)


def has_fast_bfloat16(device):
    """Whether autocast to bfloat16 pays: where the hardware has it; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ======================================================================================================================
# Prediction and evaluation: from here on, and in the report, Images.truth is read; train() does not. (open_dataset()
# stratifies the held-out fifth of some data sets by the labels.)
# ======================================================================================================================


@torch.inference_mode()
def predict(student, pixels, batch_area=2**20):
    """Class probabilities, float32 (N, C) on the CPU, of uint8 pixels (N, 3, H, W) on any device. No augmentation.

    batch_area: images of so many pixels are named at once, 256 of 64 x 64; at most 1024, and at least one.
    """
    device = next(student.parameters()).device
    student.eval()
    batch_size = max(1, min(1024, batch_area // pixels.shape[-1] ** 2))
    batches = (pixels[i : i + batch_size] for i in range(0, len(pixels), batch_size))
    return torch.cat([student(x.to(device).float() / 255)[0].softmax(1).cpu() for x in batches])


def score(probs, truth):
    """How right predictions are: dict of accuracy, per_class (C accuracies) and confusion (C, C).

    probs: (N, C). truth: int64 (N,), -1 where unknown: such rows do not count; or None. Accuracies are shares in
    [0, 1], or None where there is nothing to count. confusion[t, p]: how many images of class t are called p.
    """
    classes = probs.shape[1]
    truth = torch.full((len(probs),), -1) if truth is None else truth
    cells = (truth * classes + probs.argmax(1))[truth >= 0]
    confusion = cells.bincount(minlength=classes**2).view(classes, classes)
    right, of_class = confusion.diag(), confusion.sum(1)
    return dict(
        accuracy=right.sum().item() / len(cells) if len(cells) else None,
        per_class=[r / t if t else None for r, t in zip(right.tolist(), of_class.tolist())],
        confusion=confusion,
    )


def evaluate(student, images):
    """score() of the student's predictions for Images against their truth."""
    return score(predict(student, images.pixels), images.truth)


# ======================================================================================================================
# That was the method. What follows brings several devices, images and teachers to it, and results to files.
#
# Several devices: torchrun starts this program once for each, as rank 0, 1, ..., W - 1. Each rank has a copy of the
# student, a W-th of the images and their labels. In a step they exchange gradients and what the contrastive loss
# compares; after an epoch, the little that the labels need of each other (everyone() above). Rank 0 alone speaks and
# writes. Where one process runs, all of this does nothing: skip it on first reading.
# ======================================================================================================================

LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun


def ranks():
    """How many processes train the student together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Number of this process; 0 where it is alone."""
    return dist.get_rank() if ranks() > 1 else 0


@contextmanager
def joined_ranks(device):
    """Within it, the processes that torchrun has started work together: one GPU each, or CPUs.

    UserError: there are fewer GPUs than processes on this machine, or it is another kind of device.
    """
    if not LAUNCHED:
        yield
        return
    if device.type == "cuda":
        gpu, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if gpu >= gpus:
            raise UserError(f"torchrun needs a GPU for each process, and there are {gpus}: --nproc_per_node={gpus}")
        torch.cuda.set_device(gpu)
    elif device.type != "cpu":
        raise UserError(f"torchrun needs --device cuda or cpu, not {device.type}")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # one may be at a download
    dist.barrier()  # nobody writes before all have looked into the folder of the results
    yield
    dist.barrier()  # nobody leaves before rank 0 has written the results: torchrun would stop it if that one failed
    dist.destroy_process_group()  # not after an error: it would wait for the others


def stops_first():
    """Whether this process is the first to stop. It has to say why; the others only stop because it is gone."""
    if not LAUNCHED:
        return True
    store, _, _ = next(dist.rendezvous("env://"))
    return store.add("stopped", 1) == 1


@contextmanager
def first_alone():
    """Let the first process of each machine do what follows before the others do: a download, for one."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if ranks() > 1 and not first:
        dist.barrier()
    yield
    if ranks() > 1 and first:
        dist.barrier()


def of_all_ranks(values):
    """The lists of plain values that the ranks have, as one, rank 0's first."""
    lists = [values] * ranks()
    if ranks() > 1:
        dist.all_gather_object(lists, values)
    return sum(lists, [])


def whole_batch(z, targets):
    """z (2B, D) and targets (B, C) of all ranks: (2WB, D) and (WB, C), where i and i + WB are the views of one image.

    Of z, the rows of this rank alone carry a gradient. Every rank computes the one loss of the whole batch, and DDP
    takes the mean of their gradients: W times the loss has the gradient of the whole.
    """
    if ranks() == 1:
        return z, targets

    def gather(x):
        parts = [torch.empty_like(x) for _ in range(ranks())]
        dist.all_gather(parts, x.contiguous())
        return parts

    parts = gather(z.detach())
    parts[rank()] = z
    first, second = zip(*(part.chunk(2) for part in parts))
    return torch.cat(first + second), torch.cat(gather(targets))


def data_parallel(student):
    """The student as a model whose gradients are the mean over the ranks. On GPUs, BatchNorm takes the statistics of
    the whole batch; on CPUs, for which torch has no SyncBatchNorm, each rank takes those of its own part."""
    if ranks() == 1:
        return student
    if next(student.parameters()).is_cuda:
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


def share_of(n):
    """Which of n images this rank reads: a list of a W-th of the numbers, in order."""
    # At random: every second file of a folder may be no image, every tenth image of a data set of one class.
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    return mixed[rank() :: ranks()].sort().values.tolist()


class ReadAgain:
    """The images `rows` of a data set, read from it again on demand: the report shows a few, of all ranks."""

    def __init__(self, source, rows, size):
        self.source, self.rows, self.size = source, rows, size

    def __getitem__(self, index):
        """uint8 (n, 3, size, size) of the images at `index`, int64 (n,)."""
        return torch.stack([square(self.source[self.rows[i]][0], self.size) for i in index.tolist()])


# ======================================================================================================================
# Images: a folder, or an entry of a table of data sets; read once, for the student and for CLIP in the same pass
# ======================================================================================================================


@dataclass(frozen=True)
class Recipe:
    """What to know of a data set: where it comes from, how CLIP is asked, what student suits it.

    source    class of torchvision.datasets, or a function of (root, download) that gives such a data set
    templates prompts, "{}" stands for the class name
    classes   names CLIP is asked for, in the order of the labels; None: the data set's own
    train     keyword arguments for the unlabeled images, one dict for each part, which are joined
    test      the same for the held-out images; empty: a fixed fifth of `train`, stratified, is held out
    """

    source: str | Callable
    templates: tuple
    classes: tuple = None
    train: tuple = ({"split": "train"},)
    test: tuple = ({"split": "test"},)
    size: int = 32
    arch: str = "resnet18"
    views: str = "photo"
    clip: str = "ViT-B/32"
    class_prior: str = "uniform"


class HandwrittenDigits(list):
    """scikit-learn's 1797 real handwritten digits, 8x8, as (PIL image, label) pairs. They come with the package."""

    def __init__(self, root=None, download=False):
        from sklearn.datasets import load_digits

        digits = load_digits()
        gray = (digits.images * (255 / 16)).round().astype("uint8")  # (1797, 8, 8), from 0..16
        self.targets = digits.target.tolist()
        super().__init__(zip(map(Image.fromarray, gray), self.targets))


def with_the(*templates):
    """The templates, then each again with "the" for the "a" before its class name, as half of OpenAI's prompts are."""
    return templates + tuple(re.sub(r"\ba (\w+ )?\{\}", r"the \1{}", t) for t in templates)


# Class names and templates are those of openai/CLIP, data/prompts.md, where it has the data set. Names not listed here
# are torchvision's own, and of caltech101's templates only a few are taken.
NUMERALS = tuple("0123456789")
NUMBER_PROMPT = ('a photo of the number: "{}".',)
PHOTO_PROMPTS = with_the("a photo of a {}.")
SMALL_PHOTO_PROMPTS = with_the(
    *(f"a {kind}photo of a {{}}." for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ")),
    *("a bad photo of a {}.", "a good photo of a {}.", "a photo of a small {}.", "a photo of a big {}."),
)
BY_FLAG = dict(train=({"train": True},), test=({"train": False},))
WITH_VAL = ({"split": "train"}, {"split": "val"})
UNDIVIDED = dict(train=({},), test=())

DATASETS = {
    "digits": Recipe(
        HandwrittenDigits, NUMBER_PROMPT + ("a photo of the digit {}.", "the handwritten digit {}."),
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        **UNDIVIDED, size=16, arch="resnet8", views="writing", clip="offline",
    ),
    "cifar10": Recipe("CIFAR10", SMALL_PHOTO_PROMPTS, **BY_FLAG),
    "cifar100": Recipe("CIFAR100", SMALL_PHOTO_PROMPTS, **BY_FLAG),
    "stl10": Recipe("STL10", PHOTO_PROMPTS, train=({"split": "train+unlabeled"},), size=96, class_prior="none"),
    "eurosat": Recipe(
        "EuroSAT", ("a centered satellite photo of {}.",) + with_the("a centered satellite photo of a {}."),
        ("annual crop land", "forest", "brushland or shrubland", "highway or road",
         "industrial buildings or commercial buildings", "pasture land", "permanent crop land",
         "residential buildings or homes or apartments", "river", "lake or sea"),
        **UNDIVIDED, size=64, views="overhead",
    ),
    "svhn": Recipe("SVHN", NUMBER_PROMPT, NUMERALS, views="street", class_prior="none"),
    "mnist": Recipe("MNIST", NUMBER_PROMPT, NUMERALS, **BY_FLAG, views="writing"),
    "fashionmnist": Recipe(
        "FashionMNIST", with_the("a photo of a {}.", "a black and white photo of a {}."),
        ("t-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        **BY_FLAG,
    ),
    "food101": Recipe("Food101", ("a photo of {}, a type of food.",), size=128),
    "dtd": Recipe(
        "DTD", with_the(*(f"a photo of a {{}} {noun}." for noun in ("texture", "pattern", "thing", "object"))),
        train=WITH_VAL, size=128,
    ),
    "flowers102": Recipe("Flowers102", ("a photo of a {}, a type of flower.",), train=WITH_VAL, size=128),
    "oxford-pets": Recipe(
        "OxfordIIITPet", ("a photo of a {}, a type of pet.",), train=({"split": "trainval"},), size=128
    ),
    "caltech101": Recipe(
        "Caltech101", with_the("a photo of a {}.", "a drawing of a {}."), **UNDIVIDED, size=128, class_prior="none"
    ),
}  # fmt: skip
OWN_IMAGES = Recipe(None, PHOTO_PROMPTS, size=None, class_prior="none")
FROM_RECIPE = ("clip", "size", "arch", "views", "class_prior")  # settings that are the recipe's where they are None


def recipe_of(dataset, images=None):
    """The entry of the table, or that for a folder of images. UserError: there is none of that name."""
    if images:
        return OWN_IMAGES
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset!r}; there is: {nearest(dataset, DATASETS)}")
    return DATASETS[dataset]


def open_dataset(dataset, root="data", split="train"):
    """A data set of the table as (PIL image, label) pairs, downloaded where it is missing.

    split: "train", the unlabeled images, or "test", the held-out ones. Returns (data set, class names).
    UserError: unknown name; no network; an archive that was cut off.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}; there is: train, test")
    import torchvision

    recipe = recipe_of(dataset)
    source = recipe.source if callable(recipe.source) else getattr(torchvision.datasets, recipe.source)
    remedy = (
        f"Without network, give the same command on another machine and copy its folder {root} here. If an earlier "
        f"download was cut off, delete what it left of {dataset} in {root}"
    )
    with as_user_error(f"cannot get {dataset}", Exception, remedy=remedy):  # torchvision raises a dozen kinds
        parts = [source(root=root, download=True, **kw) for kw in (split == "test" and recipe.test) or recipe.train]
    own = getattr(parts[0], "classes", None) or getattr(parts[0], "categories", None)
    classes = list(recipe.classes or (name.replace("_", " ") for name in own))
    if own and len(own) != len(classes):
        raise UserError(f"{dataset} in {root} has {len(own)} classes, not {len(classes)}: was its unpacking cut off?")
    if recipe.test:
        return torch.utils.data.ConcatDataset(parts), classes
    from sklearn.model_selection import train_test_split

    labels = parts[0].targets if hasattr(parts[0], "targets") else parts[0].y
    kept = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return torch.utils.data.Subset(parts[0], kept[split == "test"]), classes


SYSTEM_FILES = r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini"  # that macOS and Windows lay into folders of images


class Folder(torch.utils.data.Dataset):
    """Every file below a folder (or one file) as (PIL image, label). An item that is no readable image raises.

    names: relative paths, sorted; bytes that are no text are written as \\x... labels: a dict name -> class number,
    for evaluation alone; the label of other files is -1. Links are followed only to files within the folder.
    """

    def __init__(self, root):
        root = Path(root)
        if not root.exists():
            raise UserError(f"{root} does not exist")
        if root.is_file():
            root = root.resolve()
            root, self.paths = root.parent, [root]
        else:
            every = [p for p in sorted(root.rglob("*")) if not re.fullmatch(SYSTEM_FILES, p.name)]
            # A folder counts as a file where its files are out of reach.
            self.paths = [p for p in every if p.is_symlink() or not p.is_dir() or not os.access(p, os.R_OK)]
        self.root, self.labels = root.resolve(), {}
        self.names = [os.fsencode(p.relative_to(root).as_posix()).decode(errors="backslashreplace") for p in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        if not path.resolve().is_relative_to(self.root):
            raise OSError("a link out of the folder")
        if not path.is_file():  # opening a named pipe would wait for ever
            raise OSError("no regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large images, broken EXIF and the like
            with Image.open(path) as image:
                if image.format == "EPS":
                    raise OSError("EPS is a program, which is not run")
                return upright_rgb(image), self.labels.get(self.names[i], -1)

    def usual_size(self):
        """Side for the student's images: the largest of 32, 64, 96 and 128 that half of (up to 20) images reach."""
        sides = []
        for i in range(0, len(self), math.ceil(len(self) / 20) or 1):
            with suppress(Exception):  # told by name when all are read
                sides.append(min(self[i][0].size))
        median = sorted(sides)[len(sides) // 2] if sides else 0
        return max(side for side in (32, 64, 96, 128) if side <= max(median, 32))


def upright_rgb(image):
    """Any PIL image as 8-bit RGB: turned as its EXIF says, over white where transparent.

    Gray of 16 or 32 bits is stretched from its own darkest and brightest value: such images seldom fill their range.
    """
    with suppress(Exception):  # where the EXIF is broken, the image need not be
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        values = (values - values.min()) / max(np.ptp(values), 1e-12)
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def square(image, size, by="bicubic", fit="shortest"):
    """PIL image -> uint8 (3, size, size): its short side to `size`, then the centre, as OpenAI's preprocess does.

    by: "bicubic" or "bilinear". fit: "shortest", or "squash" for both sides to `size`.
    """
    image, short = image.convert("RGB"), min(image.size)
    if max(image.size) > 16 * short:  # a line, scaled until it is `size` high, would take gigabytes
        image = centre(image, *(min(side, 16 * short) for side in image.size))
    shape = [size if fit == "squash" else size * side // short for side in image.size]
    image = centre(image.resize(shape, Image.Resampling[by.upper()]), size, size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def centre(image, width, height):
    """The middle of a PIL image, as torchvision's CenterCrop finds it."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


class Squares:
    """Item i of a data set of (PIL image, label) as (i, label, its uint8 arrays, ""), one array for each function of
    `prepare`; or, where it cannot be read, (i, -1, [], why). Arrays, since tensors would come from the workers through
    shared memory, of which containers have little."""

    def __init__(self, dataset, prepare):
        self.dataset, self.prepare = dataset, prepare

    def __getitem__(self, i):
        try:
            image, label = self.dataset[i]
            return i, label, [prepare(image).numpy() for prepare in self.prepare], ""
        except Exception as error:  # Pillow raises a dozen kinds
            return i, -1, [], first_line(error) or type(error).__name__


class PixelFile:
    """uint8 (N, 3, S, S) in an unnamed file that vanishes with the process: memory stays flat as N grows.

    Reading maps the file anew for each batch, since the pages of a lasting map would pile up in memory.
    """

    def __init__(self, shape, folder=None):
        self.shape, self.device = shape, torch.device("cpu")
        self.file = tempfile.TemporaryFile(dir=folder)

    def __len__(self):
        return self.shape[0]

    def __setitem__(self, rows, pixels):
        """Write at a slice of rows."""
        self.file.seek(rows.start * math.prod(self.shape[1:]))
        self.file.write(pixels.numpy().tobytes())
        self.file.flush()

    def __getitem__(self, index):
        """Rows by a slice or an int64 tensor, as a tensor in memory."""
        rows = index.numpy() if isinstance(index, Tensor) else index
        return torch.from_numpy(np.array(np.memmap(self.file, np.uint8, "r", shape=self.shape)[rows]))


def names_of(source):
    """The name of each image of a data set: its own, or its position in the original data set."""
    return getattr(source, "names", None) or [f"{i:05d}" for i in getattr(source, "indices", range(len(source)))]


def ignore_interrupts(worker):
    """Leave Ctrl-C to the main process: workers need not each print a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts_held():
    """Ctrl-C counts at the end of this block; pressed again, at once."""
    pressed, usual = [], signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield  # Ctrl-C does not come here, or is somebody else's
        return

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, usual)
        tell("stopping after this batch; to stop at once, press Ctrl-C again")

    signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pressed:
        raise KeyboardInterrupt


def unbroken(loader):
    """The batches of a DataLoader. Ctrl-C counts between two of them.

    If it broke into the loader while that hands work to a worker, the lock of a queue could stay taken, on which the
    loader would then wait for ever when it ends its workers.
    """
    held = interrupts_held if loader.num_workers else nullcontext
    with held():
        batches = iter(loader)
    while True:
        with held():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def read_images(source, size, prepare=None, encode=None, strict=True, memory=8.0, folder=None, title="images"):
    """Read each image of a data set of (PIL image, label) once, by several processes; with several ranks, its share.

    prepare: PIL image -> uint8 (3, S, S), as the teacher wants it; encode: (B, 3, S, S) of these -> (B, K) rows, such
    as features. strict: raise UserError at the first unreadable file. Otherwise these are listed in skipped.csv in
    `folder`, where the pixels lie as well if they take more than `memory` gigabytes.
    Returns (pixels, names, truth, rows or None, what all ranks have skipped as dicts of file and reason).
    """
    if len(source) < ranks():
        raise UserError(f"{title}: {len(source)} are too few for {ranks()} processes")
    own, names = share_of(len(source)), names_of(source)
    shape = (len(own), 3, size, size)
    pixels = PixelFile(shape, folder) if math.prod(shape) > memory * 1e9 else torch.empty(shape, dtype=torch.uint8)
    squares = Squares(source, [partial(square, size=size)] + ([prepare] if prepare else []))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun: so many processes share them
    loader = torch.utils.data.DataLoader(
        squares, 128, sampler=own, collate_fn=list, worker_init_fn=ignore_interrupts,
        num_workers=min(cores, 16) if len(own) > 2000 else 0,  # workers take seconds to start
    )  # fmt: skip
    kept, truth, rows, failed = [], [], [], []
    with progress(title, "image", len(own)) as bar:
        for batch in unbroken(loader):
            bar.update(len(batch))
            failed += [(i, why) for i, _, _, why in batch if why]
            if strict and failed:
                raise UserError(f"cannot read {names[failed[0][0]]}: {failed[0][1]}")
            good = [item[:3] for item in batch if not item[3]]
            if good:
                index, labels, views = zip(*good)
                small, *asked = (torch.from_numpy(np.stack(view)) for view in zip(*views))
                pixels[len(kept) : len(kept) + len(index)] = small
                kept += [names[i] for i in index]
                truth += labels
                if encode:
                    rows.append(encode(*asked).cpu())
    if not kept:
        first = f", such as {names[failed[0][0]]}: {failed[0][1]}" if failed else ""
        where = " in the share of one process" if ranks() > 1 else ""
        raise UserError(f"{title}: none of {len(own)} files{where} is a readable image{first}")
    if isinstance(pixels, PixelFile):
        pixels.shape = (len(kept), *shape[1:])
    else:
        pixels = pixels[: len(kept)]
    skipped = [dict(file=names[i], reason=reason) for i, reason in sorted(of_all_ranks(failed))]
    if skipped and folder and rank() == 0:
        write_csv(folder / "skipped.csv", skipped)
        tell(f"{len(skipped)} of {len(source)} files are no readable images: see {folder / 'skipped.csv'}")
    return pixels, kept, torch.tensor(truth), torch.cat(rows) if rows else None, skipped


def load_images(dataset="digits", root="data", split="train", size=None, teacher=None):
    """Read a data set of the table once: pixels for the student and, with a teacher, its image features.

    Returns Images on the CPU. Arguments and errors as open_dataset(); size in pixels, None: the table's.
    """
    source, classes = open_dataset(dataset, root, split)
    asked = (teacher.prepare, teacher.encode_images) if teacher else ()
    size = size or DATASETS[dataset].size
    pixels, names, truth, features, _ = read_images(source, size, *asked, title=f"{dataset}, {split}")
    return Images(pixels, names, classes, truth, features)


# ======================================================================================================================
# Teachers: CLIP as two packages have it, a cache of what it has seen, or a file of another teacher's answers
# ======================================================================================================================

OFFLINE_CLIP = Path(__file__).resolve().parent / "tutorials/offline_clip.pt"
if not OFFLINE_CLIP.exists():  # no checkout: where pip puts data files
    OFFLINE_CLIP = Path(sys.prefix) / "share/tclip/offline_clip.pt"
OPENAI_CLIP = "RN50 RN101 RN50x4 RN50x16 RN50x64 ViT-B/32 ViT-B/16 ViT-L/14 ViT-L/14@336px".split()
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Teacher:
    """A CLIP model, whichever package it comes from.

    prepare         PIL image -> uint8 (3, S, S), resized as the model was trained
    encode_images   uint8 (B, 3, S, S) -> float32 unit rows (B, D)
    encode_texts    list of B strings -> float32 unit rows (B, D)
    digest          of the weights and all else on which encode_images depends
    """

    prepare: Callable
    encode_images: Callable
    encode_texts: Callable
    digest: bytes = b""


def load_clip(name="offline", device="cpu"):
    """A Teacher from its name, in half precision on CUDA and float32 elsewhere.

    name: "offline", the small CLIP beside the tutorials, that knows digits only; one of OPENAI_CLIP; "arch:tag" or
    "arch:FILE", a model of open_clip; or the path of a state_dict in OpenAI's format.
    UserError: unknown name, no network, cut-off download, unreadable file.
    """
    device = torch.device(device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if ":" in name and not Path(name).is_file():
        model, tokenize = open_clip_model(name, device)
    else:
        model, tokenize = openai_clip_model(name, device)
    model = model.to(device).eval()
    if dtype == torch.float32:
        model.float()  # OpenAI's weights are stored in half precision
    visual = model.visual
    preset = dict(mean=OPENAI_MEAN, std=OPENAI_STD, interpolation="bicubic", resize_mode="shortest")
    preset |= getattr(visual, "preprocess_cfg", {})  # open_clip keeps it with the model
    mean, std, by, fit = (preset[key] for key in ("mean", "std", "interpolation", "resize_mode"))
    size = preset.get("size") or getattr(visual, "input_resolution", None) or visual.image_size
    size = size if isinstance(size, int) else size[0]
    shift, scale = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))

    @torch.inference_mode()
    def encode_images(pixels):
        x = (pixels.to(device).float() / 255 - shift) / scale
        return F.normalize(model.encode_image(x.to(dtype)).float(), dim=1)

    @torch.inference_mode()
    def encode_texts(texts):
        tokens = tokenize(texts).to(device)  # (B, 77)
        if name == "offline" and (model.token_embedding.weight[tokens] == 0).all(2).any():
            raise UserError(f"the offline CLIP knows digits only, not the words {texts[0]!r}: try --clip ViT-B/32")
        return F.normalize(model.encode_text(tokens).float(), dim=1)

    digest = hashlib.blake2b(repr((name, device.type, mean, std, visual)).encode())
    for tensor in visual.state_dict().values():
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return Teacher(partial(square, size=size, by=by, fit=fit), encode_images, encode_texts, digest.digest())


def openai_clip_model(name, device):
    """OpenAI's own CLIP, by the package `clip` or, where that is missing, by open_clip: (model, tokenize)."""
    try:
        import clip

        tokenize = partial(clip.tokenize, truncate=True)  # PyPI's "clip" is another program, without it
    except (ImportError, AttributeError):
        import open_clip

        clip, tokenize = None, open_clip.tokenize
    if name == "offline" or Path(name).is_file():
        build = clip.model.build_model if clip else open_clip.model.build_model_from_openai_state_dict
        wrong = AttributeError, KeyError, TypeError, RuntimeError
        with as_user_error(f"{name} is not a state_dict of OpenAI's CLIP", *wrong):
            return build(read_tensors(OFFLINE_CLIP if name == "offline" else name)), tokenize
    if name not in OPENAI_CLIP:
        raise UserError(f"unknown CLIP {name!r}; there is: {nearest(name, [*OPENAI_CLIP, 'offline'])}, arch:tag, FILE")
    file = Path("~/.cache/clip").expanduser() / f"{name.replace('/', '-').replace('@', '-')}.pt"
    remedy = f"Without network, copy it to {file} from elsewhere; if its download was cut off, delete that file"
    with as_user_error(f"cannot load {name}", OSError, RuntimeError, remedy=remedy):
        if clip:
            return clip.load(name, device)[0], tokenize
        return open_clip.load_openai_model(file.stem.removesuffix("px"), device=device), tokenize


def open_clip_model(name, device):
    """A model of open_clip by its "arch:tag" or "arch:FILE": (model, tokenize)."""
    import open_clip

    arch, tag = name.split(":", 1)
    known = open_clip.list_pretrained(as_str=True)
    if name not in known and not (arch in open_clip.list_models() and Path(tag).is_file()):
        tags = [other for other in known if other.startswith(f"{arch}:")]
        raise UserError(f"unknown CLIP {name!r}; there is: {nearest(name, tags or known)}")
    preset = open_clip.get_pretrained_cfg(arch, tag)
    precision = "fp16" if device.type == "cuda" else "fp32"
    quick_gelu = preset.get("quick_gelu", False)  # open_clip only warns when weights trained with it run without it
    remedy = (
        f"Without network, copy the weights of {preset.get('hf_hub') or preset.get('url')} from elsewhere and name "
        f"the file: --clip {arch.removesuffix('-quickgelu')}{'-quickgelu' if quick_gelu else ''}:FILE"
    )
    level = logging.root.manager.disable
    logging.disable()  # a missing network is told once, not a dozen times
    try:
        with as_user_error(f"cannot load {name}", Exception, remedy=remedy):
            tokenize = open_clip.get_tokenizer(arch)
            model = open_clip.create_model(arch, tag, precision=precision, device=device, force_quick_gelu=quick_gelu)
            return model, tokenize
    finally:
        logging.disable(level)


def cached(teacher, folder):
    """The teacher with its image features kept in folder/features.sqlite, so that it encodes an image once.

    A feature is found by the very pixels that the model is given and by the digest of its weights: a changed file or
    model is never answered from an old entry. What was encoded is kept batch by batch, so an interrupted pass goes on
    where it was. UserError: the cache cannot be used.
    """
    if not teacher.digest:
        raise ValueError("a Teacher without a digest cannot be told from another one")
    file = Path(folder).expanduser() / "features.sqlite"

    @contextmanager
    def opened():
        with as_user_error(f"cannot use {file}", OSError, sqlite3.Error, remedy="Delete it, or run with --no-cache"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(file, timeout=60)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS features (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID")
                yield database

    def encode_images(pixels):
        keys = [hashlib.blake2b(view.numpy().tobytes(), digest_size=20, key=teacher.digest).digest() for view in pixels]
        with opened() as database:
            marks = ",".join("?" * len(keys))
            rows = dict(database.execute(f"SELECT key, row FROM features WHERE key IN ({marks})", keys))
            new = [i for i, key in enumerate(keys) if key not in rows]
            if new:
                features = teacher.encode_images(pixels[new]).cpu().numpy()
                fresh = [(keys[i], row.tobytes()) for i, row in zip(new, features)]
                rows.update(fresh)
                database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", fresh)
        return torch.from_numpy(np.stack([np.frombuffer(rows[key], np.float32) for key in keys]))

    with opened():  # what is wrong with the file is told before an image is read
        return replace(teacher, encode_images=encode_images)


def read_labels(path):
    """Rows of a csv file with the columns file, label and maybe confidence: dict file -> (label, confidence or 1).

    UserError: unreadable, no such columns, no row, a file twice, a confidence outside [0, 1].
    """
    found = {}
    with as_user_error(f"cannot read {path}", OSError, ValueError, csv.Error):
        with open(path, newline="", encoding="utf-8-sig") as file:  # "-sig": spreadsheets put a mark in front
            reader = csv.DictReader(file)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise ValueError("its first line must name the columns: file,label or file,label,confidence")
            for row in reader:
                name, label, confidence = (unguarded(row.get(k) or "") for k in ("file", "label", "confidence"))
                if not name or not label:
                    raise ValueError(f"no file or no label in line {reader.line_num}")
                if name in found:
                    raise ValueError(f"{name} twice, again in line {reader.line_num}")
                found[name] = label, float(confidence or 1)
                if not 0 <= found[name][1] <= 1:
                    raise ValueError(f"confidence {confidence} of {name} is not within 0 and 1")
        if not found:
            raise ValueError("it has no row")
    return found


def read_npz(path):
    """File names, class names and probs float32 (N, C) from an npz file of these arrays. UserError: one is wrong."""
    with as_user_error(f"cannot read {path} (npz with files, classes, probs)", Exception):  # numpy raises a dozen kinds
        with np.load(path, allow_pickle=False) as data:
            files, classes, probs = data["files"], data["classes"], data["probs"].astype(np.float32)
        if not all(names.dtype.kind == "U" and names.ndim == 1 for names in (files, classes)):
            raise ValueError("files and classes must be lists of strings")
        if probs.shape != (len(files), len(classes)) or not probs.size:
            raise ValueError(f"probs are {probs.shape}, for {len(files)} files and {len(classes)} classes")
        if not (np.isfinite(probs).all() and (probs >= 0).all() and (probs.sum(1) > 0).all()):
            raise ValueError("probs are not finite, or below zero, or all zero for an image")
        known, times = np.unique(files, return_counts=True)
        if len(known) < len(files):
            raise ValueError(f"{known[times.argmax()]} twice")
    return files.tolist(), classes.tolist(), torch.from_numpy(probs / probs.sum(1, keepdims=True))


def plain(name):
    """A class name without what differs from list to list: capitals, underscores, spaces around it."""
    return name.casefold().replace("_", " ").strip()


def class_numbers(labels, classes, path):
    """The labels as numbers of their classes, names compared as plain(). UserError: one is no class."""
    numbers = {plain(name): i for i, name in enumerate(classes)}
    if len(numbers) < max(2, len(classes)):
        raise UserError(f"{path}: two classes are needed at least, and none twice: {', '.join(classes)}")
    for label in labels:
        if plain(label) not in numbers:
            raise UserError(f"{path}: {label!r} is not among the classes; there is: {nearest(label, classes)}")
    return [numbers[plain(label)] for label in labels]


def read_pseudo_labels(path, classes=None):
    """Another teacher's answers. Returns (file names, class names, probs float32 (N, C)).

    path: see read_npz() for .npz, read_labels() for .csv; what a confidence lacks to 1 is spread evenly over the other
    classes. classes: names to put the columns in order of; None: those of the file. UserError: other classes.
    """
    if Path(path).suffix == ".npz":
        files, own, probs = read_npz(path)
        classes = classes or own
        order = class_numbers(classes, own, path)
        if sorted(order) != list(range(len(own))):
            raise UserError(f"{path} has {len(own)} classes, not {len(set(order))}: {', '.join(own)}")
        return files, classes, probs[:, order]
    found = read_labels(path)
    labels, confidence = zip(*found.values())
    classes = classes or sorted(set(labels))
    mine = F.one_hot(torch.tensor(class_numbers(labels, classes, path)), len(classes))
    confidence = torch.tensor(confidence)[:, None].clamp_min(1 / len(classes))  # (N, 1): a label is the likeliest class
    return list(found), classes, mine * confidence + (1 - mine) * (1 - confidence) / (len(classes) - 1)


def match(names, files, probs):
    """The rows of probs (M, C) that belong to `names`, by the M file names: (N, C). Even where a name has none."""
    row = {file: i for i, file in enumerate(files)}
    missing = [name for name in names if name not in row]
    if len(missing) == len(names):
        raise UserError(f"none of the {len(names)} images has a pseudo-label: {names[0]} is not like {files[0]}")
    if missing:
        tell(f"{len(missing)} of {len(names)} images have no pseudo-label, such as {missing[0]}: they start undecided")
    known = set(names)
    others = [file for file in files if file not in known]
    if others:
        tell(f"{len(others)} pseudo-labels are of other files, such as {others[0]}")
    even = probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])
    return torch.cat([probs, even])[[row.get(name, len(files)) for name in names]]


# ======================================================================================================================
# Files: read without running code in them, written whole or not at all
# ======================================================================================================================


def read_tensors(path):
    """torch.load of tensors and plain types only: no code in the file is run. UserError: it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a dozen kinds, by what is wrong with it
        reason = "cut off? If so, delete it" if Path(path).is_file() else "there is no such file"
        if "TorchScript" in str(error):
            reason = "it is TorchScript; if OpenAI's, lay it into ~/.cache/clip and name the model"
        raise UserError(f"cannot read {path} as a file of tensors: {reason}") from error


def load_student(path):
    """(student, class names) from a run's model.pt; images are square, of side student.size. UserError: unreadable."""
    model = read_tensors(path)
    with as_user_error(f"{path} is not the model.pt of a run", KeyError, TypeError, RuntimeError):
        student = Student(model["arch"], len(model["classes"]), model["size"])
        student.load_state_dict(model["student"])
    return student.eval(), model["classes"]


def first_line(error):
    """What an exception says, for the middle of a one-line message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def as_user_error(message, *kinds, remedy=""):
    """Errors of these kinds within become a UserError: the message, the first line of what they say, the remedy."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{message}: {first_line(error)}" + (f". {remedy}" if remedy else "")) from error


def progress(title, unit, total, done=0):
    """A progress bar, where stderr is a terminal, of rank 0."""
    return tqdm(desc=title, unit=unit, total=total, initial=done, disable=rank() > 0 or None)


def tell(message):
    """Print a remark on stderr, once for all ranks and without breaking the progress bar."""
    if rank() == 0:
        tqdm.write(f"tclip: {message}", file=sys.stderr)


def write_whole(path, write):
    """Let write(path of a draft) make a file, then put it into place at once: `path` is never half-written."""
    draft = path.with_name(path.name + ".part")
    try:
        write(draft)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    except Exception as error:  # torch and safetensors have their own kinds for a full disk
        draft.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {first_line(error)}") from error


def write_csv(path, rows):
    """Rows (an iterable of dicts with the same keys) as a csv file with a header; no spreadsheet sees a formula."""

    def write(draft):
        with open(draft, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for i, row in enumerate(rows):
                if i == 0:
                    writer.writerow(row)
                writer.writerow(map(guarded, row.values()))

    write_whole(path, write)


def write_json(path, value):
    """Plain types as an indented json file."""
    write_whole(path, lambda draft: draft.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def guarded(value):
    """A cell that a spreadsheet shows as the text it is: what begins like a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and re.match(r"'*[=+\-@\t\r]", value) else value


def unguarded(cell):
    """A cell as it was before guarded()."""
    return cell[1:] if re.match(r"'+[=+\-@\t\r]", cell) else cell


# ======================================================================================================================
# Command line
# ======================================================================================================================


def parse(argv):
    """Config from command-line arguments, and what to do: dict of resume, predict, model and export."""

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)

    summary, _, usage, *_ = __doc__.split("\n\n")
    parser = Parser("tclip", description=f"{summary}\n\n{usage}", formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(Config):
        text, choices = f.metadata["help"].replace("%", "%%"), f.metadata["choices"]
        if choices:
            text += f": {', '.join(choices)}"
        if f.name in FROM_RECIPE:
            text += " [the data set's]"
        elif f.default is not None and f.type is not bool:
            text += f" [{f.default}]"
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.name.upper())
        kind["default"] = argparse.SUPPRESS  # Config knows it
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, **kind)
    parser.add_argument("--resume", metavar="RUN", help="go on with the interrupted run in this folder")
    parser.add_argument("--predict", metavar="PATH", help="name the images in this folder, or this one, by --model")
    parser.add_argument("--model", metavar="FILE", help="model.pt of a run, for --predict and --export")
    parser.add_argument("--export", choices=("onnx",), help="write --model as model.onnx and model.safetensors, too")
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":  # of a shell variable that is not set
            raise UserError(f"--{name.replace('_', '-')} is empty")
    action = {name: given.pop(name) for name in ("resume", "predict", "model", "export")}
    if bool(action["model"]) != bool(action["predict"] or action["export"]):
        raise UserError("--model FILE goes with --predict PATH or --export onnx, and they with it")
    resumed = action["resume"]
    if not resumed:
        return Config(**given), action
    if given or action["model"]:
        raise UserError(f"--resume takes every setting from {resumed}/config.json: give no others")
    with as_user_error(f"cannot resume {resumed}", OSError, ValueError, TypeError):
        values = json.loads((Path(resumed) / "config.json").read_text())
        return Config(**values | dict(out=resumed)), action  # wherever the folder lies by now


def complete(config):
    """The config with what the data set's entry in the table says, where it says nothing, and a folder for results."""
    recipe = recipe_of(config.dataset, config.images)
    config = replace(config, **{name: getattr(recipe, name) for name in FROM_RECIPE if getattr(config, name) is None})
    if config.size is None:
        config = replace(config, size=Folder(config.images).usual_size())
    out = results_folder(config.out, Path(config.images).resolve().name if config.images else config.dataset)
    if config.images and out.resolve().is_relative_to(Path(config.images).resolve()):
        raise UserError(f"the results in {out} would lie among the images: choose another --out")
    return replace(config, out=str(out))


def results_folder(out, name):
    """The folder `out` or, where that is None, the first of runs/NAME, runs/NAME-2, ... that does not exist.

    UserError: `out` has something in it: results of another run would be lost.
    """
    if out is None:
        folders = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in count(1))
        return next(folder for folder in folders if not folder.exists())
    there = [Path(out)] if Path(out).is_file() else Path(out).glob("*")
    if any(path.suffix != ".part" for path in there):  # a draft may lie there, of a run that broke off at once
        raise UserError(f"{out} is not empty: choose another --out, or go on with --resume {out}")
    return Path(out)


def make_folder(out):
    """Make the folder `out`, and see that a file can be written there: better an OSError now than after hours."""
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()


def listed(value, separator=None):
    """Items of a setting: the lines of the text file that it names, or else its parts between separators."""
    if value is None:
        return None
    parts = value.split(separator) if separator else [value]
    if os.path.isfile(value):
        with as_user_error(f"cannot read {value}", OSError, UnicodeError):
            parts = Path(value).read_text(encoding="utf-8-sig").splitlines()
    items = [part.strip() for part in parts if part.strip()]
    if not items or len(set(items)) < len(items):
        raise UserError(f"{value} {'names something twice' if items else 'is empty'}")
    return items


def read_truth(truth, names, classes):
    """Class numbers of files by name, for evaluation: a csv file's, or (truth = "folders") those of their folders."""
    if truth == "folders":
        known = {plain(name) for name in classes}
        labels = {name: own for name in names if plain(own := Path(name).parent.name) in known}
    else:
        labels = {name: label for name, (label, _) in read_labels(truth).items()}
    there = len(labels.keys() & names)
    if not there:
        raise UserError(f"--truth {truth} tells nothing of the {len(names)} files, such as {names[0]}")
    if there < len(names):
        tell(f"--truth {truth} knows {there} of {len(names)} files")
    return dict(zip(labels, class_numbers(labels.values(), classes, truth)))


def open_sources(config):
    """What config names: (unlabeled data set, held-out data set or None, class names)."""
    classes = listed(config.classes, ",")
    if not config.images:
        unlabeled, own = open_dataset(config.dataset, config.root, "train")
        if classes and len(classes) != len(own):
            raise UserError(f"{config.dataset} has {len(own)} classes, in this order: {', '.join(own)}")
        return unlabeled, open_dataset(config.dataset, config.root, "test")[0], classes or own
    if config.pseudo_labels and not classes:
        classes = read_pseudo_labels(config.pseudo_labels)[1]
    if not classes or len(classes) < 2:
        raise UserError('--images needs the names of two classes or more: --classes "cat,dog"')
    unlabeled = Folder(config.images)
    if not len(unlabeled):
        raise UserError(f"there is no file in {config.images}")
    if config.truth:
        unlabeled.labels = read_truth(config.truth, unlabeled.names, classes)
    return unlabeled, None, classes


def clip_annotator(config, classes, device):
    """CLIP as two functions for read_images(): PIL image -> pixels as it wants them; these -> probs (B, C), CPU."""
    teacher = load_clip(config.clip, device)
    if not config.no_cache:
        teacher = cached(teacher, config.cache)
    templates = listed(config.templates) or recipe_of(config.dataset, config.images).templates
    if not all("{}" in template for template in templates):
        raise UserError('--templates: each needs {} for the class name, as "a photo of a {}."')
    prompts = text_classifier(teacher, classes, templates).cpu()  # names that it lacks are told here
    return teacher.prepare, lambda views: zero_shot_probs(teacher.encode_images(views).cpu(), prompts)


def run(config, resume=False):
    """A whole run: images, pseudo-labels, training, evaluation; the results lie in config.out.

    Returns the summary on rank 0, which writes the results, and None on the others.
    """
    started, device, out = time.time(), pick_device(config.device), Path(config.out)
    Student(config.arch, 2)  # an unknown arch is told before anything is downloaded
    options = dict(strict=config.strict or not config.images, memory=config.memory, folder=out)
    with first_alone():
        unlabeled, heldout, classes = open_sources(config)
        if not config.pseudo_labels:
            options["prepare"], options["encode"] = clip_annotator(config, classes, device)
    if config.pseudo_labels:  # their columns in the order of the classes, by which truth is numbered
        files, _, answers = read_pseudo_labels(config.pseudo_labels, classes)
    make_folder(out)
    if not resume and rank() == 0:
        write_json(out / "config.json", asdict(config))

    pixels, names, truth, probs, skipped = read_images(unlabeled, config.size, title="unlabeled images", **options)
    if heldout:
        unseen, _, unseen_truth, unseen_probs, _ = read_images(heldout, config.size, title="held-out images", **options)
    options.clear()  # frees CLIP's memory
    if config.pseudo_labels:
        probs = match(of_all_ranks(names), files, answers).split(of_all_ranks([len(names)]))[rank()]

    student, labels = train(config, Images(pixels, names, classes, truth), probs, out)

    # From here on the images of all ranks, in the order of the data set.
    row, names = {name: i for i, name in enumerate(names_of(unlabeled))}, of_all_ranks(names)
    order = torch.tensor([row[name] for name in names]).argsort()
    parts = probs, balance(probs), labels.table, predict(student, pixels), truth
    probs, balanced, table, student_probs, truth = (everyone(part).cpu()[order] for part in parts)
    names.sort(key=row.get)
    pixels = pixels if ranks() == 1 else ReadAgain(unlabeled, [row[name] for name in names], config.size)
    if heldout:
        parts = unseen_probs, predict(student, unseen), unseen_truth
        unseen_probs, unseen_student, unseen_truth = (None if part is None else everyone(part) for part in parts)
    if rank() > 0:
        return None

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    kind = kind if ranks() == 1 else f"{ranks()} x {kind}"
    summary = dict(dataset=config.images or config.dataset, teacher=config.pseudo_labels or config.clip)
    summary |= dict(seed=config.seed, device=kind, torch=torch.__version__, images=len(names), skipped=len(skipped))
    summary["agreement"] = (probs.argmax(1) == student_probs.argmax(1)).float().mean().item()
    said = dict(teacher=probs, balanced_teacher=balanced, label=table, transductive=student_probs)
    scores = {name: score(answer, truth) for name, answer in said.items()}
    summary |= {f"{name}_accuracy": result["accuracy"] for name, result in scores.items()}
    summary["per_class_teacher"] = dict(zip(classes, scores["teacher"]["per_class"]))
    summary["per_class_student"] = dict(zip(classes, scores["transductive"]["per_class"]))
    if heldout:
        asked = unseen_probs is not None  # CLIP was; a file of pseudo-labels does not name these images
        summary["teacher_inductive_accuracy"] = score(unseen_probs, unseen_truth)["accuracy"] if asked else None
        summary["inductive_accuracy"] = score(unseen_student, unseen_truth)["accuracy"]
    summary["seconds"] = round(time.time() - started, 1)
    write_results(config, Images(pixels, names, classes, truth), probs, table, student, student_probs, summary, skipped)
    return summary


def write_results(config, images, probs, table, student, student_probs, summary, skipped):
    """labels.csv, model.pt, summary.json and, where tclip_report.py lies beside this file, the report."""
    out, classes = Path(config.out), images.classes
    columns = ("file", "teacher_label", "teacher_confidence", "label", "confidence", "changed")
    best = zip(images.names, *map(Tensor.tolist, (*probs.max(1), *table.max(1))))
    rows = ((file, classes[a], f"{p:.4f}", classes[b], f"{q:.4f}", int(a != b)) for file, p, a, q, b in best)
    write_csv(out / "labels.csv", (dict(zip(columns, row)) for row in rows))
    model = dict(arch=config.arch, size=config.size, classes=classes, student=student.state_dict())
    write_whole(out / "model.pt", partial(torch.save, model))
    write_json(out / "summary.json", summary)
    try:
        import tclip_report
    except ImportError:  # tclip.py was copied alone
        return
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    report = out / "report.html"
    tclip_report.write_report(report, config, images, probs, table, student_probs, summary, history, skipped)
    if summary["teacher_accuracy"] is not None:
        scores = score(probs, images.truth), score(student_probs, images.truth)
        write_whole(out / "noise.png", lambda draft: tclip_report.draw_noise(draft, classes, *scores))


def predict_folder(config, path, model):
    """Name the images in a folder, or one image, by a student, without CLIP. Returns the path of predictions.csv."""
    student, classes = load_student(model)
    student.to(pick_device(config.device))
    source, what = Folder(path), Path(path).resolve()
    out = results_folder(config.out, f"predict-{what.name if what.is_dir() else what.stem}")
    make_folder(out)
    options = dict(strict=config.strict, memory=config.memory, folder=out, title=str(path))
    pixels, names, *_ = read_images(source, student.size, **options)
    best = predict(student, pixels).topk(min(3, len(classes)))

    def row(name, values, numbers):
        cells = dict(file=name)
        for suffix, value, number in zip(("", "_2", "_3"), values.tolist(), numbers.tolist()):
            cells |= {f"label{suffix}": classes[number], f"confidence{suffix}": f"{value:.4f}"}
        return cells

    write_csv(out / "predictions.csv", map(row, names, *best))
    return out / "predictions.csv"


def in_one_line(summary):
    """What a run has come to, for the terminal."""

    def percent(*names):
        return " -> ".join("?" if summary[name] is None else f"{100 * summary[name]:.1f} %" for name in names)

    if summary["teacher_accuracy"] is None:
        return f"student and teacher agree on {percent('agreement')} of the images"
    line = f"teacher -> student: {percent('teacher_accuracy', 'transductive_accuracy')} on the unlabeled images"
    if "inductive_accuracy" in summary:
        line += f", {percent('teacher_inductive_accuracy', 'inductive_accuracy')} on held-out ones"
    return line


def main(argv=None):
    """The command line. Returns the exit code: 0, 2 after a UserError, 130 after Ctrl-C."""
    config = None
    try:
        config, action = parse(argv)
        if action["model"] and LAUNCHED:
            raise UserError("--predict and --export are for one process: leave torchrun out")
        if action["predict"]:
            print(f"wrote {predict_folder(config, action['predict'], action['model'])}")
        if action["export"]:
            with as_user_error('export needs tclip_export.py and pip install -e ".[export]"', ImportError):
                from tclip_export import export_student
            print(f"wrote {export_student(action['model'])}")
        if action["model"]:
            return 0
        config = config if action["resume"] else complete(config)
        with joined_ranks(pick_device(config.device)):
            summary = run(config, bool(action["resume"]))
    except KeyboardInterrupt:
        begun = config and config.out and Path(config.out, "config.json").exists()
        hint = f" Go on with: python tclip.py --resume {config.out}" if begun else ""
        code, message = 130, f"\ntclip: stopped.{hint}"
    except torch.OutOfMemoryError:
        code, message = 2, "tclip: the GPU has too little memory: try a smaller --batch-size or --size"
    except (UserError, OSError) as error:  # OSError: the disk is full, a name is too long
        code, message = 2, f"tclip: {first_line(error)}"
    except RuntimeError:
        if stops_first():
            raise
        return 1
    else:
        if summary:  # rank 0 speaks
            print(f"results in {config.out}\n{in_one_line(summary)}; {summary['seconds']:.0f} s on {summary['device']}")
        return 0
    if not stops_first():
        return 1  # another rank has said why, or what was raised here is that it is gone
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.modules["tclip"] = sys.modules["__main__"]  # for the modules that import tclip: one UserError, not two
    exit_code = main()
    if LAUNCHED:  # at a usual exit threads of torch.distributed, which may still run, abort the process now and then
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
