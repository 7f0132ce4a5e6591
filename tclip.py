"""tclip: train a small classifier from unlabeled images and class names alone.

    python tclip.py                                              # handwritten digits: offline, a minute on a CPU
    python tclip.py --dataset cifar10                            # named by OpenAI's CLIP ViT-B/32, for a GPU

CLIP names every image once, for some classes nearly always wrongly. A small network is trained from scratch on that by
a class-conditional contrastive loss and ensemble labels: Huang et al., "Transductive CLIP with Class-Conditional
Contrastive Learning", ICASSP 2022, arXiv 2206.06177. The equations are our reading of it, see README.md.
"""

import csv
import json
import math
import os
import re
import sys
import time
from argparse import SUPPRESS, ArgumentParser, RawTextHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.transforms import functional as TF
from tqdm import tqdm


class UserError(SystemExit):
    """Something the user can mend: where nobody catches it, the program ends with this one line."""


# ==== Settings: each field is a flag of the command line ==============================================================
DEVICES = [*["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]


def setting(default, help, allowed=None):
    """A field of Config, its line of --help, and the values it may take: a tuple of words, or the ends of a range."""
    return field(default=default, metadata=dict(help=help, allowed=allowed))


@dataclass
class Config:
    """The settings of a run. UserError: a value is not allowed. A data set of the table has defaults of its own."""

    dataset: str = setting("digits", "name in the table DATASETS")
    root: str = setting("data", "folder where torchvision keeps its data sets, or downloads them to")
    clip: str = setting("ViT-B/32", "teacher: a model of OpenAI, arch:tag or arch:FILE of open_clip, or offline")
    cache: str = setting("~/.cache/tclip", "folder for CLIP's image features, so that it sees an image once, or none")
    size: int = setting(32, "side of the student's images, in pixels", (8, 1024))
    arch: str = setting("resnet18", "student: resnet8, or a resnet of torchvision")
    views: str = setting("photo", "augmentation", ("photo", "overhead", "writing"))
    epochs: int = setting(40, "passes over the images", (1, 10**6))
    batch_size: int = setting(128, "images a step, over all processes; each is seen in two views", (2, 10**6))
    lr: float = setting(0.1, "peak learning rate for a batch of 256, scaled linearly with it", (0, 1e3))
    weight_decay: float = setting(5e-4, "L2 penalty", (0, 1))
    c3l_weight: float = setting(1.0, "lambda: weight of the contrastive loss beside cross-entropy", (0, 1e3))
    temperature: float = setting(0.5, "of the contrastive loss", (1e-3, 1e3))
    class_share: float = setting(0.5, "how far the contrastive loss pulls by class; the rest by instance", (0, 1))
    label_momentum: float = setting(0.5, "m: share of a label that is kept each epoch; 1: labels stay", (0, 1))
    label_neighbours: int = setting(15, "k: images whose predictions make an ensemble label", (1, 10**4))
    class_prior: str = setting("none", "the classes' known shares: uniform, 5,3,2 in order, cat:0.7,dog:0.3, or a file")
    seed: int = setting(0, "makes a run repeat, on the same CPU to the bit", (0, 2**32 - 1))
    device: str = setting(DEVICES[0], "where to train", DEVICES)
    compile: bool = setting(False, "torch.compile the student: slower to start, faster on a GPU")
    out: str = setting(None, "folder of the results [runs/DATASET, or the next free runs/DATASET-2, ...]")

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if allowed and not (value in allowed if f.type is str else allowed[0] <= value <= allowed[1]):
                end = f"choose from {', '.join(allowed)}" if f.type is str else "from {} to {}".format(*allowed)
                raise UserError(f"--{f.name.replace('_', '-')} {value}: {end}")


# ==== Pseudo-labels: CLIP names every image once ======================================================================
def text_classifier(encode_texts, classes, templates):
    """Zero-shot weights, unit rows (C, D): per class the mean of its prompts' embeddings (Radford et al. 2021, 3.1.4).
    encode_texts: list of B strings -> unit rows (B, D). templates: prompts in which "{}" stands for the class name."""
    rows = [encode_texts([t.replace("{}", name) for t in templates]).mean(0) for name in classes]
    return F.normalize(torch.stack(rows), dim=1)


def zero_shot_probs(image_features, text_features, temperature=0.01):
    """p(class | image) = softmax(cosine / temperature), float32 (N, C), of unit rows (N, D) and (C, D). Radford et al.
    2021, 3.1.2. temperature: the model's own, 1 / exp(logit_scale); 0.01 for OpenAI's."""
    return (image_features.float() @ text_features.float().T / temperature).softmax(1)


# ==== Class-conditional contrastive loss (C3L) ========================================================================
def class_conditional_contrastive_loss(z, targets, temperature=0.5, class_share=0.5):
    """Class discrimination and instance discrimination in one contrastive loss. Our reading of arXiv 2206.06177:

        L_i = - sum_j w_ij log( exp(s_ij) / sum_k v_ik exp(s_ik) ),    s_ij = <z_i, z_j> / temperature

    where j, k run over all rows but i. w says what is pulled together, v what is pushed apart, by the class agreement
    a_ij = <T_i, T_j>, the chance that i and j share a class by the present labels T; a_ii+ = 1 for its other view i+.

        w_ij = c a_ij / sum_k a_ik + (1 - c) [j = i+],    c the class_share: 1 pulls by class, 0 by instance
        v_ik = 1 - a_ik,                                  only images of other classes are pushed away

    but v_ii+ = 1, and in the term of a positive j its own v_ij = 1: each term is a logarithm of a share. Where no image
    shares a class it is SimCLR's loss (Chen et al. 2020).
    z: (2B, D) unit rows; rows i and i + B are views of one image. targets: (B, C) on the simplex. A float32 scalar."""
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)  # (2B, 2B), the diagonal
    other_view = itself.roll(len(z) // 2, 0)
    with torch.autocast(z.device.type, enabled=False):  # exp(s) needs float32
        s = (z.float() @ z.float().T / temperature).masked_fill(itself, -torch.inf)
        agreement = (targets.float() @ targets.float().T).clamp(0, 1).repeat(2, 2)
    by_instance, by_class = other_view.float(), agreement.masked_fill(itself, 0).masked_fill(other_view, 1)
    w = torch.lerp(by_instance, by_class / by_class.sum(1, keepdim=True), class_share)  # rows sum to 1
    v = (1 - agreement).masked_fill(other_view, 1)
    denominator = (s + v.log()).logsumexp(1, keepdim=True)  # (2B, 1)
    denominator = torch.logaddexp(denominator, s + (1 - v).log())  # (2B, 2B): v_ij raised to 1 in the term of j itself
    return -(w * (s - denominator).masked_fill(itself, 0)).sum(1).mean()  # the diagonal is no term


# ==== Ensemble labels =================================================================================================
def nearest(embeddings, k, pool=50_000):
    """The k nearest others of each image, int64 (N, k), by cosine of unit rows (N, D); beyond `pool` of random ones."""
    members = torch.randperm(len(embeddings), device=embeddings.device)[:pool]
    bank, found = embeddings[members].T, []  # (D, pool)
    for rows in torch.arange(len(embeddings), device=members.device).split(256):  # N x pool cosines would be gigabytes
        cosines = (embeddings[rows] @ bank).masked_fill(rows[:, None] == members, -torch.inf)  # (256, pool)
        found.append(members[cosines.topk(min(k, len(members) - 1)).indices])
    return torch.cat(found)


def bayes_rule(answers, near, mass, trust=1.0, sharpness=1.5, smoothing=0.1):
    """Labels (N, C): (prior x likelihood of the teacher's word)^a x (likelihood of the neighbourhood)^s,

        q_ic ~ (pi_c T0_ic / mean_j T0_jc)^a (n_ic / pi_c + smoothing)^s,    a: trust, s: sharpness

    answers: T0, the teacher's (N, C); over its mean, how much more than usual it says c here. near: n, the mean of
    what is said of the neighbours (N, C). mass: pi, that of all images (C,); n / pi is how much denser c is there."""
    density = (near + smoothing * mass) / mass
    return (trust * (mass * answers / answers.mean(0)).log() + sharpness * density.log()).softmax(1)


def verdict(answers, near, enough=0.86):
    """The exponents (a, s) of bayes_rule(), after a trial in which the labels stood without the teacher's word (a = 0).
    trust: the power, at most 1, at which an answer's first choice is 20 times as likely as its second, in the geometric
    mean, or a certain one 0.6 likely if that is more: teachers are surer than right. Of answers (N, C) to that power,
    foretold: how often the neighbourhoods' first choice (N, C) is theirs, over their mean confidence; the less it is,
    the less the embedding knows: s = 1.5 (foretold / 0.9)^4, at most 1.5. conceded: the probability that they give to
    that choice, over the same. From `enough` on the word is not missed: a = 0; else a = trust. Constants by trial."""
    told = answers.amax(1) > answers.amin(1)  # even answers are none
    words, choice = answers[told].log(), near[told].argmax(1, keepdim=True)  # (M, C), (M, 1)
    first, second = words.topk(2).values.mean(0)
    odds = torch.tensor(max(20, 1.5 * (words.shape[1] - 1)))  # 1.5 : 1 against all others is 0.6
    trust = (odds.log() / (first - second)).clamp(max=1)
    believed = (trust * words).softmax(1)
    claim, said = believed.amax(1), believed.gather(1, choice)[:, 0]  # (M,), of its own choice, and the neighbourhood's
    foretold, conceded = (said == claim).float().mean() / claim.mean(), said.mean() / claim.mean()
    return torch.stack([trust * (conceded < enough), 1.5 * (foretold / 0.9).clamp(max=1) ** 4])


def with_shares(probs, shares, iterations=100):
    """The nearest labels (N, C) whose classes have the given shares (C,): optimal transport (Sinkhorn and Knopp)."""
    weights = torch.ones_like(shares)
    for _ in range(iterations):
        weights = shares / shares.sum() * len(probs) / (probs.T @ (1 / (probs @ weights)))
    return (probs * weights / (probs @ weights)[:, None]).clamp_min(1e-6)  # its log is to be finite in float16, too


class EnsembleLabels(torch.nn.Module):
    """Pseudo-labels T that follow an embedding by Bayes' rule: T <- m T + (1 - m) q, see bayes_rule().
    Before training the embedding is CLIP's, where it gives features (N, D), and what is said of an image is its label,
    in 20 rounds, whose outcome takes the place of the teacher's answers; after each epoch, the student's, and its mean
    prediction over the views it saw. The first 5 rounds, and again the first `trial` epochs, run without the teacher's
    word; then verdict() sets the exponents, with features a > 0. probs: its answers (N, C). class_prior: the classes'
    shares (C,), if known. `table` is T, `near` the last n, float16 (N, C). The rule is ours, not the paper's."""

    def __init__(self, probs, features=None, momentum=0.5, neighbours=15, class_prior=None, trial=5):
        super().__init__()
        self.momentum, self.neighbours, self.class_prior = momentum, neighbours, class_prior
        answers = probs.float().clamp_min(1e-6)
        self.register_buffer("answers", (answers if class_prior is None else with_shares(answers, class_prior)).half())
        self.register_buffer("table", self.answers.clone())
        self.register_buffer("exponents", torch.tensor([0, 1.5], device=probs.device))
        self.register_buffer("trial", torch.tensor(trial, device=probs.device))  # epochs of it that are left
        self.register_buffer("near", torch.zeros_like(self.table))  # the last n, of images that have one
        self.predictions, self.embeddings = torch.zeros_like(self.table), None  # sums over an epoch's views
        if features is not None and momentum < 1:
            places = nearest(F.normalize(features.float(), dim=1), neighbours)
            for step in range(20):
                self.update(slice(None), self.targets(slice(None)), places)
                if step == 4:  # CLIP's answers are made of these features: that they agree proves nothing
                    self.exponents[:] = verdict(self.answers.float(), self.near.float(), enough=torch.inf)
            self.answers.copy_(self.table)  # from now on these are T0
            self.exponents[:] = torch.tensor([0, 1.5])

    def update(self, index, said, places):
        """One step for the images `index`, of what is said (B, C) and the neighbours' places in it (B, k)."""
        near = sum(said[column] for column in places.T) / places.shape[1]  # (B, k, C) at once would be gigabytes
        self.near[index] = near.half()
        q = bayes_rule(self.answers[index].float(), near, said.mean(0).clamp_min(1e-6), *self.exponents)
        q = q if self.class_prior is None else with_shares(q.clamp_min(1e-12), self.class_prior)
        self.table[index] = torch.lerp(q, self.targets(index), self.momentum).clamp_min(1e-6).half()

    def targets(self, index):
        """Present labels, float32 (B, C), of the images `index`, int64 (B,)."""
        return F.normalize(self.table[index].float(), p=1, dim=1)  # float16 rows sum to 1 but for some 1 / 1000

    def record(self, index, probs, embeddings):
        """Add predictions (B, C) and unit embeddings (B, D) for one view of each of the images `index`, int64 (B,)."""
        if self.momentum < 1:
            if self.embeddings is None:
                self.embeddings = torch.zeros(len(self.table), embeddings.shape[1], device=self.table.device)
            self.predictions.index_add_(0, index, probs.detach().half())
            self.embeddings.index_add_(0, index, embeddings.detach().float())

    def end_epoch(self):
        """Follow what was recorded. Images that were not seen keep their label."""
        if self.embeddings is not None:
            seen = self.predictions.sum(1, dtype=torch.float32).nonzero()[:, 0]
            said = F.normalize(self.predictions[seen].float(), p=1, dim=1)
            self.update(seen, said, nearest(F.normalize(self.embeddings[seen], dim=1), self.neighbours))
            self.trial -= 1
            if self.trial == 0:
                self.exponents[:] = verdict(self.answers[seen].float(), self.near[seen].float())
            elif self.trial < 0:  # labels may wander off alone. Less is enough now: good ones contradict a bad teacher
                self.exponents[0].clamp_min_(verdict(self.answers[seen].float(), self.near[seen].float(), 0.7)[0])
        self.predictions, self.embeddings = torch.zeros_like(self.table), None

    def final(self, predictions):
        """A run's best answer (N, C): the rule once more, so that n counts twice, on labels mixed with predictions."""
        table, sharpness = self.targets(slice(None)), self.exponents[1]
        both = torch.lerp(table, predictions.to(table.device), sharpness / (1.5 + sharpness))  # at most half and half
        return bayes_rule(both, self.near.float(), both.mean(0), 1.0, sharpness) if self.momentum < 1 else table


# ==== Augmentation: on the device, each image with a draw of its own (torchvision's transforms draw once a batch) =====
VIEWS = {  # keyword arguments of augment()
    "photo": dict(area=(0.3, 1.0), flip=0.5, jitter=0.4, gray=0.2),
    "overhead": dict(area=(0.5, 1.0), flip=0.5, rotate=180, jitter=0.2),  # no up or down seen from above; colour tells
    "writing": dict(area=(0.6, 1.3), rotate=15, jitter=0.3, padding="zeros"),  # white on black
}


def augment(pixels, padding="reflection", views=1, **ranges):
    """Random views of images, first the first of each: uint8 (B, 3, S, S) -> float32 (views * B, 3, S, S) in [0, 1], as
    by torchvision's functions. padding: of what lies outside, "reflection" or "zeros". ranges: see draw_views()."""
    pixels = pixels.repeat(views, 1, 1, 1)
    draw = draw_views(len(pixels), device=pixels.device, **ranges)
    width, height, angle, sign = draw["width"], draw["height"], draw["angle"].deg2rad(), 1 - 2 * draw["mirrored"]
    sin, cos = angle.sin(), angle.cos()
    # Where an output point (x, y) in [-1, 1], y down, comes from: mirror, then rotate, then scale and shift.
    across = width * sign * cos, -width * sin, 2 * draw["left"] + width - 1
    down = height * sign * sin, height * cos, 2 * draw["top"] + height - 1
    grid = F.affine_grid(torch.stack(across + down, 1).view(-1, 2, 3), pixels.shape, align_corners=False)
    x = F.grid_sample(pixels.float() / 255, grid, padding_mode=padding, align_corners=False)
    brightness, contrast, saturation = (draw[k].view(-1, 1, 1, 1) for k in ("brightness", "contrast", "saturation"))
    x = (brightness * x).clamp_(0, 1)
    x = torch.lerp(TF.rgb_to_grayscale(x.mean((2, 3), keepdim=True)), x, contrast).clamp_(0, 1)
    return torch.lerp(TF.rgb_to_grayscale(x), x, saturation).clamp_(0, 1)


def draw_views(n, area=(1.0, 1.0), ratio=(3 / 4, 4 / 3), rotate=0.0, flip=0.0, jitter=0.0, gray=0.0, device="cpu"):
    """Random parameters of n views, a dict of float32 tensors (n,).
    width, height, left, top: a window in shares of the image's side, as torchvision's RandomResizedCrop draws it: its
    area from `area`, its width / height from `ratio`, anew until it lies within the image (not where `area` goes above
    1: the image may shrink in it). angle: degrees, counter-clockwise, within +-rotate. mirrored: 1, by chance `flip`.
    brightness, contrast, saturation: factors within 1 +- jitter; saturation is 0 with probability `gray`."""
    tries = torch.rand(2, 10, n, device=device)
    side = (area[0] + (area[1] - area[0]) * tries[0]).sqrt()  # (10, n)
    stretch = (math.log(ratio[0]) / 2 + math.log(ratio[1] / ratio[0]) / 2 * tries[1]).exp()
    fits = (torch.maximum(side * stretch, side / stretch) <= 1) | (area[1] > 1)
    first = fits.byte().argmax(0, keepdim=True)  # (1, n)
    width, height = (torch.where(fits, x, 1).gather(0, first)[0] for x in (side * stretch, side / stretch))
    across, down, turn, mirror, bright, strong, vivid, colour = torch.rand(8, n, device=device)
    brightness, contrast, saturation = (1 + jitter * (2 * u - 1) for u in (bright, strong, vivid))
    draw = dict(width=width, height=height, left=across * (1 - width), top=down * (1 - height))
    draw |= dict(angle=rotate * (2 * turn - 1), mirrored=(mirror < flip).float(), brightness=brightness)
    return draw | dict(contrast=contrast, saturation=saturation * (colour >= gray))


# ==== Student =========================================================================================================
class Student(nn.Module):
    """The network that is trained: float (B, 3, S, S) in [0, 1] -> logits (B, C), unit embeddings (B, embedding_dim).
    arch: resnet8, or a resnet of torchvision, up to 64 px (`size`) with CIFAR's stem: 3x3, stride 1, and no max-pool.
    backbone: in their place another network, images (B, 3, S, S) about zero -> features (B, width), and its width."""

    def __init__(self, arch, num_classes, size=32, embedding_dim=128, backbone=None):
        super().__init__()
        self.arch, self.size = arch, size
        if backbone or arch == "resnet8":
            self.backbone, width = backbone or (resnet8(size), 128)
        elif arch.startswith("resnet") and arch in torchvision.models.list_models():
            self.backbone = torchvision.models.get_model(arch)
            width, self.backbone.fc = self.backbone.fc.in_features, nn.Identity()
            if size <= 64:
                self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
                self.backbone.maxpool = nn.Identity()
        else:
            raise UserError(f"--arch {arch}: there is resnet8, and torchvision's resnet18, resnet34, resnet50, ...")
        self.classifier = nn.Linear(width, num_classes)
        layers = nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, embedding_dim)
        self.projector = nn.Sequential(*layers)

    def forward(self, x):
        h = self.backbone((x - 0.5) / 0.25)  # (B, width)
        return self.classifier(h), F.normalize(self.projector(h).float(), dim=1)


def resnet8(size):
    """Features (B, 128) by a ResNet of three basic blocks. From 32 px on its first convolution halves the image."""
    stem = nn.Conv2d(3, 32, 6, 2, 2, bias=False) if size >= 32 else nn.Conv2d(3, 32, 3, padding=1, bias=False)
    layers = [stem, nn.BatchNorm2d(32), nn.ReLU(), BasicBlock(32, 32)]
    for width in (32, 64):
        shortcut = nn.Sequential(conv1x1(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width))
        layers.append(BasicBlock(width, 2 * width, stride=2, downsample=shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ==== Training: under torchrun each process has all images and labels, and takes its share of each batch ==============
def train(config, pixels, probs, features=None, out=None, objective=None, on_epoch=None, student=None, labels=None):
    """Train a student on unlabeled images and what a teacher says of them: (student, labels). No truth comes here.
    pixels: uint8 (N, 3, S, S). probs: (N, C), the teacher's. features: its unit image features (N, D), or
    None. out: folder (Path) for metrics.csv and checkpoint.pt, written each epoch; from these training goes on, on a
    CPU to the bit as if it had never stopped. objective, student, labels: in place of tclip_objective(), a Student,
    EnsembleLabels. on_epoch: called after each epoch with its row, student and labels."""
    if len(pixels) < 2:
        raise UserError("one image is too few: labels follow its neighbours")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, objective = torch.device(config.device), objective or tclip_objective
    torch.manual_seed(config.seed)
    student = student or Student(config.arch, probs.shape[1], pixels.shape[-1])
    student.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    shares = class_shares(config.class_prior, range(probs.shape[1]))
    probs, features, shares = (None if x is None else x.to(device) for x in (probs, features, shares))
    rule = config.label_momentum, config.label_neighbours, shares, max(1, config.epochs // 8)
    labels = (labels or EnsembleLabels)(probs, features, *rule)
    parts, history = dict(student=student, optimizer=optimizer, labels=labels), []
    if out and (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        history = state["history"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if device.type != "cuda" or pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        pixels = pixels.to(device)  # where batches are gathered: then no step waits for the host
    model = nn.SyncBatchNorm.convert_sync_batchnorm(student) if world > 1 and device.type == "cuda" else student
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    model = torch.compile(model) if config.compile else model
    steps = min(math.ceil(len(pixels) / config.batch_size), len(pixels) // world)  # an epoch
    bar = tqdm(None, "student", config.epochs * steps, initial=len(history) * steps, disable=rank > 0 or None)
    for epoch in range(len(history), config.epochs):
        started, losses = time.time(), torch.zeros(2, device=device)
        for buffer in labels.buffers() if world > 1 else ():  # sums on a GPU differ in the last bit
            dist.broadcast(buffer, 0)
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # the draws of an epoch depend on no earlier one
        order = torch.randperm(len(pixels), device=device)
        order = order[: len(order) // world * world].view(-1, world)  # (N / W, W): a column for each process
        if rank > 0:
            torch.manual_seed(config.seed + 1_000_003 * (epoch + 1) + 15_485_863 * rank)  # views of its own
        model.train()
        for step, batch in enumerate(order.tensor_split(steps)):  # (B / W, W)
            optimizer.param_groups[0]["lr"] = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
            mine = pixels[batch[:, rank].to(pixels.device)].to(device)  # uint8 (B / W, 3, S, S)
            views = augment(mine, views=2, **VIEWS[config.views])  # (2B / W, 3, S, S)
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bfloat16(device)):
                logits, z = model(views.contiguous(memory_format=torch.channels_last))
            logits, z, index = whole_batch(logits.float()), whole_batch(z), batch.T.flatten()  # (2B, C), (2B, D), (B,)
            classification, contrastive = objective(logits, z, index, labels, config)
            optimizer.zero_grad()
            (world * (classification + contrastive)).backward()  # see whole_batch()
            optimizer.step()
            labels.record(index.repeat(2), logits.softmax(1), z)
            losses += torch.stack([classification, contrastive]).detach() / steps
            bar.update()
        if not losses.isfinite().all():
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: try a lower --lr than {config.lr}")
        (classification, contrastive), (trust, sharpness) = losses.tolist(), labels.exponents.tolist()
        row = dict(epoch=epoch + 1, loss=classification + contrastive, classification=classification)
        row |= dict(contrastive=contrastive, trust=trust, sharpness=sharpness)
        labels.end_epoch()
        changed = (labels.table.argmax(1) != probs.argmax(1)).float().mean().item()
        history.append(row | dict(labels_changed=changed, seconds=round(time.time() - started, 3)))
        bar.set_postfix_str(f"loss {row['loss']:.3f}, labels changed {changed:.1%}")
        if on_epoch:
            on_epoch(history[-1], student, labels)
        if out and rank == 0:
            write_csv(out / "metrics.csv", history)
            state = {name: part.state_dict() for name, part in parts.items()} | dict(history=history)
            torch.save(state, out / "checkpoint.part")
            os.replace(out / "checkpoint.part", out / "checkpoint.pt")  # whole or not at all
    return student.eval(), labels


def class_shares(prior, classes):
    """Shares (C,) of the classes, C names, of any sum, or None. prior: none, uniform, or a number for each in order, or
    with its name, "cat:0.7,dog:0.3" (not in train()); or a file of these, one a line. UserError: it is none of that."""
    with suppress(ValueError):  # no number, no name, or no text
        told = Path(prior).read_text("utf-8-sig") if os.path.isfile(prior) else prior
        told = ",".join("1" * len(classes)) if prior == "uniform" else re.sub(r"\s*([:,\n])\s*", r"\1", told.strip())
        names, _, numbers = zip(*(part.rpartition(":") for part in re.split("[,\n]", told)))  # names are "" if not told
        shares = None if prior == "none" else torch.tensor([float(number) for number in numbers])
        shares = shares[[names.index(name) for name in classes]] if any(names) else shares
        if shares is None or (len(names) == len(classes) == len(shares) and shares.min() >= 1e-5 * shares.sum() > 0):
            return shares
    raise UserError(f"--class-prior {prior}: none, uniform, or {len(classes)} shares, none below 0.00001 of their sum")


def tclip_objective(logits, z, index, labels, config):
    """What a step minimises, two scalars: cross-entropy with the ensemble labels, lambda times the contrastive loss.
    logits (2B, C) and unit embeddings z (2B, D) of two views: rows i and i + B are of the image index[i]."""
    targets = labels.targets(index)  # (B, C)
    cross_entropy = F.cross_entropy(logits, targets.repeat(2, 1))
    c3l = class_conditional_contrastive_loss(z, targets, config.temperature, config.class_share)
    return cross_entropy, config.c3l_weight * c3l


def whole_batch(x):
    """x (2B / W, ...) of all W processes as (2B, ...): all first views, then all second. Its own rows have a gradient.
    Every process computes the loss of the whole batch. DDP takes the mean of the gradients: W times is the whole's."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.stack(parts).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 2)  # (W, 2, B / W, ...) -> (2B, ...)


def learning_rate(config, progress):
    """Linear warm-up in the first twentieth of the run, then a cosine to zero. progress: share of the run done."""
    return config.lr * config.batch_size / 256 * min(progress / 0.05, (1 + math.cos(math.pi * progress)) / 2)


def has_fast_bfloat16(device):
    """Whether autocast to bfloat16 pays: where the hardware has it; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ==== Evaluation: truth is used here and in the results alone =========================================================
@torch.inference_mode()
def predict(student, pixels):
    """Class probabilities, float32 (N, C) on the CPU, of uint8 pixels (N, 3, S, S) on any device. No augmentation."""
    device = next(student.parameters()).device
    student.eval()
    batches = pixels.split(max(1, min(1024, 2**20 // pixels.shape[-1] ** 2)))  # 256 images of 64 x 64
    return torch.cat([student(x.to(device).float() / 255)[0].softmax(1).cpu() for x in batches])


def score(probs, truth):
    """dict of accuracy, per_class (C of them) and confusion (C, C), row truth, column said, of predictions (N, C).
    truth: int64 (N,), -1 where unknown, which does not count. Accuracies are shares in [0, 1], or None of no image."""
    classes, known = probs.shape[1], truth >= 0
    confusion = (truth * classes + probs.argmax(1))[known].bincount(minlength=classes**2).view(classes, classes)
    right, of_class = confusion.diag().tolist(), confusion.sum(1).tolist()
    accuracy, *per_class = (r / n if n else None for r, n in zip([sum(right), *right], [sum(of_class), *of_class]))
    return dict(accuracy=accuracy, per_class=per_class, confusion=confusion)


# ==== Data sets: each image is read once, for the student and for CLIP ================================================
@dataclass
class Images:
    """N images at the student's size, and what the teacher says of them."""

    names: list  # N distinct strings
    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    truth: torch.Tensor  # int64 (N,), -1 where unknown; for evaluation alone
    probs: torch.Tensor = None  # float32 (N, C), the teacher's, where it was asked
    features: torch.Tensor = None  # float32 (N, D), the teacher's unit image features, where it has any


def handwritten_digits(train):
    """Scikit-learn's 1797 real digits, 8 x 8 pixels: (PIL image, label) pairs. A fifth is held out, stratified."""
    digits = load_digits()
    gray = (digits.images * (255 / 16)).round().astype("uint8")  # from 0..16
    kept = train_test_split(range(len(gray)), test_size=0.2, stratify=digits.target, random_state=0)[0 if train else 1]
    return torch.utils.data.Subset([*zip(map(Image.fromarray, gray), digits.target.tolist())], sorted(kept))


DATASETS = {  # source: (root, whether the unlabeled part) -> (PIL image, label)s; prompts: openai/CLIP, prompts.md
    "digits": dict(
        source=lambda root, train: handwritten_digits(train),
        templates=['a photo of the number: "{}".', "a photo of the digit {}.", "the handwritten digit {}."],
        classes=["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        settings=dict(size=16, arch="resnet8", views="writing", clip="offline"),
    ),
    "cifar10": dict(
        source=lambda root, train: torchvision.datasets.CIFAR10(root, train, download=True), settings=dict(),
        templates=[f"a {kind}photo of {a} {{}}." for a in ("a", "the") for kind in
                   ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")]
                + [f"a photo of {a} {{}}." for a in ("a small", "the small", "a big", "the big")],
        classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    ),
}  # fmt: skip


def load_images(config, split, clip):
    """Read the "train" (unlabeled) or "test" (held-out) split of a data set once: Images, but for probs.
    CLIP's features are kept in a file of config.cache for each data set, split and model, and used again as long as
    their number and the first eight fit. UserError: no data set, or no folder."""
    try:
        source = DATASETS[config.dataset]["source"](config.root, split == "train")  # torchvision downloads
    except (OSError, RuntimeError) as error:
        if type(error) is RuntimeError and not re.search("corrupted|Error downloading", str(error)):  # torchvision's
            raise
        raise UserError(f"no {config.dataset}: {error}. Without network, copy {config.root} from elsewhere") from error
    file, features = f"{config.dataset}-{split}-{re.sub('[^A-Za-z0-9.]+', '-', clip.name)}.npy", None
    try:
        file = Path(config.cache).expanduser() / file
        if config.cache != "none":
            file.parent.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=file.parent).close()
    except (OSError, RuntimeError) as error:  # a RuntimeError where there is no home
        raise UserError(f"--cache {config.cache}: {error}; choose another, or none") from error
    if config.cache != "none" and file.exists():
        kept = torch.from_numpy(np.load(file, allow_pickle=False))
        first = clip.encode_images(torch.stack([clip.prepare(source[i][0]) for i in range(min(8, len(source)))]))
        fits = kept.shape == (len(source), first.shape[1]) and torch.allclose(kept[:8], first, atol=0.01)
        features = kept if fits else None
    asked, pixels, rows, truth = features is None, [], [], []

    def read(i):
        image, label = source[i]
        return square(image, config.size), clip.prepare(image) if asked else None, label

    for batch in read_ahead(read, len(source), f"{config.dataset}, {split}"):
        small, views, labels = zip(*batch)
        pixels.append(torch.stack(small))
        rows += [clip.encode_images(torch.stack(views))] if asked else []
        truth += labels
    features = torch.cat(rows) if asked else features
    if asked and config.cache != "none":
        np.save(draft := file.with_suffix(f".{os.getpid()}.npy"), features)
        os.replace(draft, file)  # whole or not at all
    names = [f"{i:05d}" for i in getattr(source, "indices", range(len(source)))]
    return Images(names, torch.cat(pixels), torch.tensor(truth), features=features)


def read_ahead(read, n, title, batch=256):
    """Lists of [read(0), ..., read(batch - 1)] and so on up to n, read by threads while the one before is in use."""
    with ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool, tqdm(desc=title, total=n, disable=None) as bar:
        ahead = pool.map(read, range(min(batch, n)))
        for start in range(batch, n + batch, batch):
            present, ahead = list(ahead), pool.map(read, range(start, min(start + batch, n)))
            yield present
            bar.update(len(present))


def square(image, size):
    """PIL image -> uint8 (3, size, size): its short side to `size`, then the centre, as CLIP's preprocessing does."""
    return TF.pil_to_tensor(TF.center_crop(TF.resize(image.convert("RGB"), size, TF.InterpolationMode.BICUBIC), size))


# ==== CLIP ============================================================================================================
class Clip:
    """A CLIP model by its name: OpenAI's, "arch:tag" or "arch:FILE" of open_clip, or offline. UserError: none such.
    prepare: its own preprocessing, PIL image -> float32 (3, S, S). temperature: its own, 1 / exp(logit_scale)."""

    def __init__(self, name="offline", device="cpu"):
        self.name, self.device = name, torch.device(device)
        self.model, self.prepare, self.tokenize = load_clip(name)
        self.model.float().to(self.device).eval()
        self.temperature = 1 / self.model.logit_scale.exp().item()

    @torch.inference_mode()
    def encode_images(self, views):
        """What prepare() gives, float32 (B, 3, S, S) -> unit rows, float32 (B, D) on the CPU."""
        with torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda"):
            return F.normalize(self.model.encode_image(views.to(self.device)).float(), dim=1).cpu()

    @torch.inference_mode()
    def encode_texts(self, texts):
        """List of B strings -> unit rows, float32 (B, D) on the CPU."""
        tokens = self.tokenize(texts).to(self.device)  # (B, 77)
        if self.name == "offline" and (self.model.token_embedding.weight[tokens] == 0).all(2).any():
            raise UserError(f"the offline CLIP knows digits only, not the words {texts[0]!r}: try --clip ViT-B/32")
        return F.normalize(self.model.encode_text(tokens).float(), dim=1).cpu()


def load_clip(name):
    """The model of that name on the CPU, its preprocessing and its tokenizer."""
    import open_clip

    if name == "offline":
        file = Path(__file__).resolve().parent / "tclip_app/offline_clip.pt"  # tiny; it knows digits alone
        if not file.exists():
            raise UserError(f"the CLIP that knows digits is missing: {file}, of tclip's repository")
        model = open_clip.model.build_model_from_openai_state_dict(torch.load(file, weights_only=True), cast_dtype=None)
        return model, open_clip.image_transform(model.visual.image_size, is_train=False), open_clip.tokenize
    arch, _, tag = name.partition(":")
    if not tag:
        with suppress(ImportError):
            import clip

            if name in getattr(clip, "available_models", list)():  # PyPI's "clip" is another program
                return *clip.load(name, "cpu"), lambda texts: clip.tokenize(texts, truncate=True)
        arch, tag = re.sub("[/@]", "-", name).removesuffix("px"), "openai"
    if (arch, tag) not in open_clip.list_pretrained() and not (arch in open_clip.list_models() and Path(tag).is_file()):
        raise UserError(f"--clip {name}: there is offline, RN50, ViT-B/32, ViT-L/14, ..., and open_clip's arch:tag")
    quick_gelu = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)  # else open_clip would only warn
    model, _, prepare = open_clip.create_model_and_transforms(arch, tag, force_quick_gelu=quick_gelu)
    return model, prepare, open_clip.get_tokenizer(arch)


# ==== A run ===========================================================================================================
def read_dataset(config):
    """The data set's unlabeled and held-out Images, named by CLIP, and the class names."""
    clip, recipe = Clip(config.clip, config.device), DATASETS[config.dataset]
    unlabeled, heldout = (load_images(config, split, clip) for split in ("train", "test"))
    prompts = text_classifier(clip.encode_texts, recipe["classes"], recipe["templates"])  # (C, D)
    for images in (unlabeled, heldout):
        images.probs = zero_shot_probs(images.features, prompts, clip.temperature)
    return unlabeled, heldout, recipe["classes"]


def run(config, read=read_dataset, resumed=False, learn=train):
    """A whole run: images, pseudo-labels, training, results. Returns the summary, a dict, of the first process.
    read: config -> (unlabeled Images, held-out Images or None, classes). resumed: begun before. learn: like train()."""
    started, rank, world = time.time(), 0, 1
    if dist.is_torchelastic_launched():
        if config.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=1))  # one may be at a download
        rank, world = dist.get_rank(), dist.get_world_size()
    if config.compile:
        try:
            torch.compile(torch.neg)(torch.ones(8, device=config.device))
        except RuntimeError as error:
            raise UserError(f"--compile: {str(error).splitlines()[0]}") from error
    folder = [config.out if resumed or rank > 0 else claim_folder(config)]
    if world > 1:
        dist.broadcast_object_list(folder)
    config = replace(config, out=folder[0])
    if rank == 0 and not resumed:
        Path(config.out, "config.json").write_text(json.dumps(asdict(config), indent=1))
    try:
        if rank > 0:
            dist.barrier()  # the first downloads and asks CLIP before the others, who find both kept
        unlabeled, heldout, classes = read(config)
        if rank == 0 and world > 1:
            dist.barrier()
        student, labels = learn(config, unlabeled.pixels, unlabeled.probs, unlabeled.features, Path(config.out))
    except KeyboardInterrupt:
        raise UserError(f"stopped; go on with --resume {config.out}") from None
    summary = write_results(config, unlabeled, heldout, classes, student, labels, started) if rank == 0 else None
    if dist.is_initialized():
        dist.barrier()  # nobody leaves before the results are written: torchrun would stop the first
        dist.destroy_process_group()
    return summary


def claim_folder(config):
    """Make a new folder for the results and return its name: two runs that begin together get two."""
    for name in [config.out] if config.out else (f"runs/{config.dataset}" + f"-{i}" * (i > 1) for i in range(1, 10**6)):
        with suppress(FileExistsError):  # where another run was quicker
            Path(name).mkdir(parents=True)
            return name
    raise UserError(f"{config.out} exists: choose another --out, or go on with --resume {config.out}")


def write_results(config, unlabeled, heldout, classes, student, labels, started):
    """labels.csv, model.pt, summary.json and, where truth is known, noise.png. Returns the summary, a dict."""
    out, truth = Path(config.out), unlabeled.truth
    said = dict(teacher=unlabeled.probs, student=predict(student, unlabeled.pixels))
    said["label"] = labels.final(said["student"]).cpu()
    scores = {f"unlabeled_{who}": score(probs, truth) for who, probs in said.items()}
    if heldout:
        scores["heldout_teacher"] = score(heldout.probs, heldout.truth)
        scores["heldout_student"] = score(predict(student, heldout.pixels), heldout.truth)
    summary = {f"{who}_accuracy": s["accuracy"] for who, s in scores.items()}
    summary |= {f"{who}_per_class": dict(zip(classes, s["per_class"])) for who, s in scores.items()}
    summary |= dict(out=config.out, images=len(truth), torch=torch.__version__, seconds=round(time.time() - started, 1))
    summary["agreement"] = score(said["student"], said["teacher"].argmax(1))["accuracy"]
    summary["device"] = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    columns = dict(file=unlabeled.names)
    for who, probs in said.items():
        (confidence, number), prefix = probs.max(1), f"{who}_".removeprefix("label_")
        columns |= {f"{prefix}label": [classes[c] for c in number], f"{prefix}confidence": confidence.tolist()}
    if (truth >= 0).any():
        columns["truth"] = [classes[c] if c >= 0 else "" for c in truth]
        side = min(4 + 0.18 * len(classes), 20)
        figure = Figure((2 * side + 1, side), layout="compressed")
        for ax, who in zip(figure.subplots(1, 2), ("teacher", "student")):
            confusion = scores[f"unlabeled_{who}"]["confusion"].numpy()
            shares = 100 * confusion / confusion.sum(1, keepdims=True).clip(1)  # of the true class, in %
            look = dict(include_values=len(classes) <= 20, values_format=".0f", im_kw=dict(vmin=0, vmax=100))
            ConfusionMatrixDisplay(shares, display_labels=classes).plot(ax=ax, xticks_rotation=90, **look)
            ax.set_title(f"{who}: {summary[f'unlabeled_{who}_accuracy']:.1%} right")
        figure.savefig(out / "noise.png", dpi=120, bbox_inches="tight")
    write_csv(out / "labels.csv", [dict(zip(columns, row)) for row in zip(*columns.values())])
    kept = dict(arch=student.arch, size=student.size, classes=classes, student=student.state_dict())
    torch.save(kept, out / "model.pt")
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


# ==== Files and command line ==========================================================================================
def write_csv(path, rows):
    """Rows (dicts with the same keys) as a csv file. What begins like a formula gets an apostrophe before it."""
    guarded = [[re.sub(r"^(?='*[=+\-@\t\r])", "'", v) if type(v) is str else v for v in row.values()] for row in rows]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(rows[0]), *guarded])


def add_settings(parser, settings):
    """A flag for each of these fields. What is not given on the command line is not in the result. ~ is the home."""
    for f in settings:
        words = f": {', '.join(f.metadata['allowed'])}" if f.type is str and f.metadata["allowed"] else ""
        text = f.metadata["help"] + words + (f" [{f.default}]" if f.default is not None and f.type is not bool else "")
        how = {bool: dict(action="store_true"), str: dict(type=os.path.expanduser)}.get(f.type, dict(type=f.type))
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=text, default=SUPPRESS, **how)


def main(argv=None):
    """The command line."""
    parser = ArgumentParser("tclip.py", "%(prog)s [--setting value ...]", __doc__, formatter_class=RawTextHelpFormatter)
    add_settings(parser, fields(Config))
    parser.add_argument("--resume", metavar="RUN", type=os.path.expanduser, help="go on with this interrupted run")
    sys.stderr = sys.stderr or open(os.devnull, "w")  # where it is closed, a progress bar would fail
    given = vars(parser.parse_args(argv))
    if folder := given.pop("resume"):
        folder = (os.path.dirname(folder) or ".") if os.path.isfile(folder) else folder
        if not Path(folder, "config.json").is_file():
            raise UserError(f"--resume {folder}: there is no run")
        given = json.loads(Path(folder, "config.json").read_text()) | given | dict(out=folder)
    name = given.get("dataset", Config.dataset)
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: choose from {', '.join(DATASETS)}")
    config = Config(**DATASETS[name]["settings"] | given)
    Student(config.arch, 2)  # an unknown one is told before anything is read
    if (shares := class_shares(config.class_prior, DATASETS[name]["classes"])) is not None:
        config = replace(config, class_prior=",".join(f"{share:g}" for share in shares.tolist()))
    if summary := run(config, resumed=bool(folder)):
        right = [f"{k.replace('_', ' ')} {v:.1%}" for k, v in summary.items() if k.endswith("accuracy")]
        with suppress(BrokenPipeError, UnicodeEncodeError):  # all is written, whoever reads this
            print("{}; {seconds:.0f} s on {device}; see {out}".format(", ".join(right), **summary), flush=True)


if __name__ == "__main__":
    main()
