"""tclip: train a small classifier from unlabeled images and class names alone.

    python tclip.py                                              # handwritten digits: offline, a minute on a CPU
    python tclip.py --dataset cifar10                            # named by OpenAI's CLIP ViT-B/32, for a GPU
    torchrun --nproc_per_node=8 tclip.py --dataset cifar10       # the same on eight GPUs
    python tclip.py --resume runs/cifar10                        # go on where a run was interrupted
    python tclip.py --help                                       # all settings

CLIP names every image once. Its answers are noisy, and for some classes nearly always wrong. A small network is trained
from scratch on them with a class-conditional contrastive loss and ensemble labels. Method: Huang, Chen, Yang, Xie, Pu,
Zhuang, "Transductive CLIP with Class-Conditional Contrastive Learning", ICASSP 2022, arXiv 2206.06177. The equations,
weights and schedule are our reading of it: see README.md, also for the command `tclip` for folders of your own images.

In this order: settings, pseudo-labels, contrastive loss, ensemble labels, augmentation, student, training, evaluation,
data sets, CLIP, a run, command line. Pseudo-labels, contrastive loss and labels need torch alone: copy them out.
"""

import argparse
import csv
import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.transforms import functional as TF
from tqdm import tqdm


class UserError(SystemExit):
    """Something the user can mend: where nobody catches it, the program ends with this one line."""

    def __init__(self, message):
        super().__init__(f"tclip: {' '.join(message.split())}")


# ==== Settings: each field is a flag of the command line ==============================================================
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
    views: str = setting("photo", "augmentation", ("photo", "overhead", "street", "writing"))
    epochs: int = setting(40, "passes over the images", (1, 10**6))
    batch_size: int = setting(128, "images a step, over all processes; each is seen in two views", (2, 10**6))
    lr: float = setting(0.1, "peak learning rate for a batch of 256, scaled linearly with it", (0, 1e3))
    weight_decay: float = setting(5e-4, "L2 penalty", (0, 1))
    c3l_weight: float = setting(1.0, "lambda: weight of the contrastive loss beside cross-entropy", (0, 1e3))
    temperature: float = setting(0.5, "of the contrastive loss", (1e-3, 1e3))
    label_momentum: float = setting(0.5, "m: share of a label that is kept each epoch; 1: labels stay", (0, 1))
    label_neighbours: int = setting(20, "k: images whose predictions make an ensemble label", (1, 10**4))
    class_prior: str = setting("none", "uniform where the classes are about equally frequent", ("uniform", "none"))
    seed: int = setting(0, "makes a run repeat, on the same CPU to the bit", (0, 2**32 - 1))
    device: str = setting("auto", "where to train", ("auto", "cpu", "cuda", "mps"))
    compile: bool = setting(False, "torch.compile the student: slower to start, faster on a GPU")
    out: str = setting(None, "folder of the results [runs/DATASET, or the next free runs/DATASET-2, ...]")

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata["allowed"]
            if allowed and f.type is str and value not in allowed:
                raise UserError(f"--{f.name.replace('_', '-')} {value}: choose from {', '.join(allowed)}")
            if allowed and f.type is not str and not allowed[0] <= value <= allowed[1]:
                raise UserError(f"--{f.name.replace('_', '-')} {value}: must be from {allowed[0]} to {allowed[1]}")


# ==== Pseudo-labels: CLIP names every image once ======================================================================
def text_classifier(encode_texts, classes, templates):
    """Zero-shot weights, unit rows (C, D): per class the mean of its prompts' embeddings, made unit again.

    encode_texts: function, list of B strings -> unit rows (B, D). classes: C names. templates: prompts in which "{}"
    stands for the name. Prompt ensembling of Radford et al. 2021, section 3.1.4.
    """
    rows = [encode_texts([t.replace("{}", name) for t in templates]).mean(0) for name in classes]
    return F.normalize(torch.stack(rows), dim=1)


def zero_shot_probs(image_features, text_features, temperature=0.01):
    """p(class | image) = softmax(cosine / temperature): unit rows (N, D) and (C, D) -> float32 (N, C).

    temperature: the model's own 1 / exp(logit_scale), 0.01 for OpenAI's. Radford et al. 2021, section 3.1.2.
    """
    return (image_features.float() @ text_features.float().T / temperature).softmax(1)


# ==== Class-conditional contrastive loss (C3L) ========================================================================
def class_conditional_contrastive_loss(z, targets, temperature=0.5, class_share=1.0, negatives="other"):
    """Class discrimination and instance discrimination in one contrastive loss.

        L_i = - sum_j w_ij log( exp(s_ij) / sum_k v_ik exp(s_ik) ),    s_ij = <z_i, z_j> / temperature

    where j and k run over all rows but i. w says what is pulled together and v what is pushed apart. Both look at the
    class agreement a_ij = <T_i, T_j>, the chance that i and j share a class by their present labels T; for the other
    view i+ of the same image, a_ii+ = 1.

        w_ij = c a_ij / sum_k a_ik + (1 - c) [j = i+],    c the class_share: 1 pulls by class, 0 by instance

        negatives "other": v_ik = 1 - a_ik      only images of other classes are pushed away
                  "all":   v_ik = 1             c = 0: SimCLR (NT-Xent); c = 1: SupCon, with soft labels

    but v_ii+ = 1, and in the term of a positive j its own v_ij = 1, as in SimCLR and SupCon: each term is a logarithm
    of a share.

    z: (2B, D) unit rows; row i and row i + B are the two views of one image. targets: (B, C) on the simplex, without
    gradient. Returns a float32 scalar, finite whatever the classes. Our reading of arXiv 2206.06177; its limits are
    Chen et al. 2020 (SimCLR) and Khosla et al. 2020 (SupCon).
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)  # (2B, 2B), the diagonal
    other_view = itself.roll(len(z) // 2, 0)
    with torch.autocast(z.device.type, enabled=False):  # exp(s) needs float32
        s = (z.float() @ z.float().T / temperature).masked_fill(itself, -torch.inf)
        agreement = (targets.float() @ targets.float().T).clamp(0, 1).repeat(2, 2)
    by_instance, by_class = other_view.float(), agreement.masked_fill(itself, 0).masked_fill(other_view, 1)
    w = torch.lerp(by_instance, by_class / by_class.sum(1, keepdim=True), class_share)  # rows sum to 1
    v = {"other": 1 - agreement, "all": torch.ones_like(s)}[negatives].masked_fill(other_view, 1)

    denominator = (s + v.log()).logsumexp(1, keepdim=True)  # (2B, 1)
    denominator = torch.logaddexp(denominator, s + (1 - v).log())  # (2B, 2B): v_ij raised to 1 in the term of j itself
    ratios = (s - denominator).masked_fill(itself, 0)  # log-ratios; the diagonal is no term
    return -(w * ratios).sum(1).mean()


# ==== Ensemble labels ================================================================================================
def neighbour_mean(embeddings, values, k, pool=50_000):
    """Mean of `values` (N, C) over the k nearest images by cosine: float32 (N, C). embeddings: (N, D) unit rows.

    Beyond `pool` images the neighbours are sought among so many random ones: the cost of an image stays flat.
    """
    members = torch.randperm(len(values), device=values.device)[:pool]
    bank, answers = embeddings[members].T, values[members].float()  # (D, pool), (pool, C)
    means = []
    for rows in embeddings.split(256):  # a block at a time: N x pool cosines would be gigabytes
        near = (rows @ bank).topk(min(k, len(answers))).indices  # (256, k)
        means.append(answers[near].mean(1))
    return torch.cat(means)


def balance(probs, iterations=20):
    """The nearest soft labels (N, C) with equally frequent classes, by optimal transport (Sinkhorn and Knopp).

    As in self-labelling (Asano et al. 2020) and SwAV (Caron et al. 2020). Reads no truth.
    """
    p = probs.float().clamp_min(1e-12)  # zero would stay zero for ever
    weights = torch.ones_like(p[0])
    for _ in range(iterations):
        columns = p.T @ (1 / (p @ weights))  # (C,), the sums that weights have to make equal
        weights = columns.sum() / columns
    return p * weights / (p @ weights)[:, None]


def consensus(q):
    """How often the neighbours of an image agree, beyond chance, in [0, 1]. q: (N, C), their mean predictions."""
    agree, chance = q.square().sum(1).mean(), q.mean(0).square().sum()
    return ((agree - chance) / (1 - chance).clamp_min(1e-6)).clamp(0, 1).item()


class EnsembleLabels(nn.Module):
    """Pseudo-labels that follow the student as far as it can be trusted. PLACEHOLDER: today's rule."""

    def __init__(self, probs, features=None, momentum=0.5, neighbours=20, class_prior="none"):
        super().__init__()
        self.momentum, self.neighbours, self.sharpness = momentum, neighbours, 2.0
        self.balanced = class_prior == "uniform"
        self.register_buffer("start", (balance(probs) if self.balanced else probs).half())  # T0
        self.register_buffer("table", self.start.clone())
        self.register_buffer("trust", torch.zeros(()))
        self.predictions, self.embeddings = torch.zeros_like(self.table), None

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
            q = neighbour_mean(F.normalize(self.embeddings[seen], dim=1), q, self.neighbours)
            agree = consensus(q)
            yes, no = agree**self.sharpness, (1 - agree) ** self.sharpness
            self.trust.fill_(yes / (yes + no))
            q = (self.sharpness * q.log()).softmax(1)
            q = balance(q) if self.balanced else q
            q = torch.lerp(self.start[seen].float(), q, yes / (yes + no))
            self.table[seen] = torch.lerp(q, self.table[seen].float(), self.momentum).half()
        self.predictions.zero_()
        self.embeddings = None


# ==== Augmentation: on the device, and each image with a draw of its own ==============================================
# (torchvision's transforms draw once for a whole batch; a contrastive loss would then tell images apart by the crop.)

VIEWS = {  # keyword arguments of augment()
    "photo": dict(area=(0.3, 1.0), flip=0.5, jitter=0.4, gray=0.2),
    "overhead": dict(area=(0.5, 1.0), flip=0.5, rotate=180, jitter=0.2),  # no up or down seen from above; colour tells
    "street": dict(area=(0.5, 1.0), rotate=10, jitter=0.4, gray=0.2),  # writing in photos has no mirror image
    "writing": dict(area=(0.6, 1.3), rotate=15, jitter=0.3, padding="zeros"),  # white on black
}


def augment(pixels, padding="reflection", views=1, **ranges):
    """Random views of each image: uint8 (B, 3, S, S) -> float32 (views * B, 3, S, S) in [0, 1], on the same device.

    First come the first views of all images, then the second. padding: what lies outside the image, "reflection" or
    "zeros". ranges: see draw_views().
    """
    pixels = pixels.repeat(views, 1, 1, 1)
    return apply_views(pixels, draw_views(len(pixels), device=pixels.device, **ranges), padding)


def draw_views(n, area=(1.0, 1.0), ratio=(3 / 4, 4 / 3), rotate=0.0, flip=0.0, jitter=0.0, gray=0.0, device="cpu"):
    """Random parameters of n views, a dict of float32 tensors (n,).

    width, height, left, top: a window in shares of the image's side, as torchvision's RandomResizedCrop draws it: its
    area from `area`, its width / height from `ratio`, anew until it lies within the image (above 1, the image shrinks
    within it). angle: degrees, counter-clockwise, within +-rotate. mirrored: 1 with probability `flip`, otherwise 0.
    brightness, contrast, saturation: factors within 1 +- jitter; saturation is 0 with probability `gray`.
    """
    tries = torch.rand(2, 10, n, device=device)
    side = (area[0] + (area[1] - area[0]) * tries[0]).sqrt()  # (10, n)
    stretch = (math.log(ratio[0]) / 2 + math.log(ratio[1] / ratio[0]) / 2 * tries[1]).exp()
    fits = (torch.maximum(side * stretch, side / stretch) <= 1) | (area[1] > 1)
    first = fits.byte().argmax(0, keepdim=True)  # (1, n)
    width, height = (torch.where(fits, x, 1).gather(0, first)[0] for x in (side * stretch, side / stretch))

    numbers = torch.rand(8, n, device=device)
    angle, *change = (limit * (2 * u - 1) for limit, u in zip((rotate, jitter, jitter, jitter), numbers))
    draw = dict(width=width, height=height, left=numbers[4] * (1 - width), top=numbers[5] * (1 - height), angle=angle)
    draw |= dict(mirrored=(numbers[6] < flip).float(), brightness=1 + change[0], contrast=1 + change[1])
    return draw | dict(saturation=(1 + change[2]) * (numbers[7] >= gray))


def apply_views(pixels, draw, padding="reflection"):
    """The views that draw_views() describes: uint8 (B, 3, S, S) -> float32 of that shape in [0, 1].

    Each step is torchvision's function of that name, image by image; window, rotation and mirror are one sampling.
    """
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


# ==== Student =========================================================================================================
class Student(nn.Module):
    """The network that is trained: forward(x) -> logits (B, C) and unit embeddings (B, embedding_dim).

    x: float (B, 3, S, S) in [0, 1]; normalisation is inside. arch: "resnet8" (0.3 M parameters, for few or simple
    images) or a resnet of torchvision, up to 64 px (`size`) with CIFAR's stem: a 3x3 convolution of stride 1 and no
    max-pool. UserError: unknown arch.
    """

    def __init__(self, arch, num_classes, size=32, embedding_dim=128):
        super().__init__()
        self.arch, self.size = arch, size
        if arch == "resnet8":
            self.backbone, width = resnet8(size), 128
        elif arch.startswith("resnet") and arch in torchvision.models.list_models():
            self.backbone = torchvision.models.get_model(arch)
            width, self.backbone.fc = self.backbone.fc.in_features, nn.Identity()
            if size <= 64:
                self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
                self.backbone.maxpool = nn.Identity()
        else:
            raise UserError(f"--arch {arch}: there is resnet8, and torchvision's resnet18, resnet34, resnet50, ...")
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
    kernel, stride, padding = (6, 2, 2) if size >= 32 else (3, 1, 1)
    stem = nn.Conv2d(3, 32, kernel, stride, padding, bias=False)
    layers = [stem, nn.BatchNorm2d(32), nn.ReLU(), BasicBlock(32, 32)]
    for width in (32, 64):
        shortcut = nn.Sequential(conv1x1(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width))
        layers.append(BasicBlock(width, 2 * width, stride=2, downsample=shortcut))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ==== Training ========================================================================================================
# Under torchrun each process has all images and labels, and takes its share of each batch.
def train(config, pixels, probs, features=None, out=None, objective=None, on_epoch=None):
    """Train a student on unlabeled images and what a teacher says of them. No truth comes here.

    pixels: uint8 (N, 3, S, S), also memory-mapped. probs: (N, C), the teacher's. features: its image features, unit
    rows (N, D), or None. out: folder (Path) for metrics.csv and checkpoint.pt, both written after each epoch; where a
    checkpoint lies there training goes on from it, on a CPU to the bit as if it had never stopped. objective: in place
    of tclip_objective(). on_epoch: called after each epoch with its row of metrics.csv, student and labels.
    Returns (student, EnsembleLabels). UserError: the loss is not finite, or the checkpoint is of another run.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, objective = pick_device(config.device), objective or tclip_objective
    bfloat16 = has_fast_bfloat16(device)
    torch.manual_seed(config.seed)
    student = Student(config.arch, probs.shape[1], pixels.shape[-1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    rule = config.label_momentum, config.label_neighbours, config.class_prior
    labels = EnsembleLabels(probs.to(device), None if features is None else features.to(device), *rule)
    parts, history = dict(student=student, optimizer=optimizer, labels=labels), []
    if out and (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", map_location=device, weights_only=True)
        if state["labels"]["table"].shape != labels.table.shape:
            raise UserError(f"{out / 'checkpoint.pt'} is of another run: its images or classes are others")
        history = state["history"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if device.type != "cuda" or pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        pixels = pixels.to(device)  # where batches are gathered: then no step waits for the host
    model = student
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
        model = nn.parallel.DistributedDataParallel(model)
    model = torch.compile(model) if config.compile else model
    steps = math.ceil(len(pixels) / config.batch_size)  # an epoch

    done = len(history)
    bar = tqdm(None, "student", config.epochs * steps, initial=done * steps, unit="step", disable=rank > 0 or None)
    for epoch in range(done, config.epochs):
        started, losses = time.time(), torch.zeros(2, device=device)
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))  # the draws of an epoch depend on no earlier one
        order = torch.randperm(len(pixels), device=device)
        order = order[: len(order) // world * world].view(-1, world)  # (N / W, W): a column for each process
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1) + 15_485_863 * rank)  # views of its own
        model.train()
        for step, batch in enumerate(order.tensor_split(steps)):  # (B / W, W)
            optimizer.param_groups[0]["lr"] = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
            mine = pixels[batch[:, rank].to(pixels.device)].to(device)
            views = augment(mine, views=2, **VIEWS[config.views])  # (2B / W, 3, S, S)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
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
        labels.end_epoch()
        for buffer in labels.buffers() if world > 1 else ():  # sums on a GPU differ in the last bit
            dist.broadcast(buffer, 0)
        row = dict(epoch=epoch + 1, loss=losses.sum().item())
        row |= dict(classification=losses[0].item(), contrastive=losses[1].item(), trust=labels.trust.item())
        row |= dict(labels_changed=(labels.table.argmax(1).cpu() != probs.argmax(1).cpu()).float().mean().item())
        history.append(row | dict(seconds=round(time.time() - started, 3)))
        bar.set_postfix_str("loss {loss:.3f}, labels changed {labels_changed:.1%}".format(**row))
        if on_epoch:
            on_epoch(history[-1], student, labels)
        if out and rank == 0:
            write_csv(out / "metrics.csv", history)
            state = {name: part.state_dict() for name, part in parts.items()} | dict(history=history)
            write_whole(out / "checkpoint.pt", partial(torch.save, state))
    return student.eval(), labels


def tclip_objective(logits, z, index, labels, config, class_share=None):
    """What a step minimises: cross-entropy with the ensemble labels, and lambda times the contrastive loss, scalars.

    logits (2B, C) and unit embeddings z (2B, D) of two views: rows i and i + B are of the image index[i].
    """
    targets = labels.targets(index)  # (B, C)
    cross_entropy = F.cross_entropy(logits, targets.repeat(2, 1))
    if config.c3l_weight == 0:
        return cross_entropy, torch.zeros_like(cross_entropy)
    class_share = 1 - labels.trust if class_share is None else class_share
    c3l = class_conditional_contrastive_loss(z, targets, config.temperature, class_share)
    return cross_entropy, config.c3l_weight * c3l


def whole_batch(x):
    """x (2B / W, ...) of all W processes as (2B, ...): all first views, then all second.

    Every process computes the loss of the whole batch, but only its own rows carry a gradient. DDP takes the mean of
    the processes' gradients: W times the loss has the gradient of the whole.
    """
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    first, second = zip(*(part.chunk(2) for part in parts))
    return torch.cat(first + second)


def learning_rate(config, progress):
    """Linear warm-up in the first twentieth of the run, then a cosine to zero. progress: share of the run done."""
    peak = config.lr * config.batch_size / 256
    return peak * min(progress / 0.05, (1 + math.cos(math.pi * progress)) / 2)


def pick_device(name):
    """torch.device of "auto", "cpu", "cuda" or "mps". UserError: there is none of that kind."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if not there.get(name, True):
        raise UserError(f"--device {name}: there is none here")
    return torch.device(max(there, key=there.get) if name == "auto" else name)  # the first that is there


def has_fast_bfloat16(device):
    """Whether autocast to bfloat16 pays: where the hardware has it; elsewhere it is emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


# ==== Evaluation: here alone truth is read ============================================================================
@torch.inference_mode()
def predict(student, pixels):
    """Class probabilities, float32 (N, C) on the CPU, of uint8 pixels (N, 3, S, S) on any device. No augmentation."""
    device = next(student.parameters()).device
    student.eval()
    batches = pixels.split(max(1, min(1024, 2**20 // pixels.shape[-1] ** 2)))  # 256 images of 64 x 64
    return torch.cat([student(x.to(device).float() / 255)[0].softmax(1).cpu() for x in batches])


def score(probs, truth):
    """How right predictions (N, C) are: dict of accuracy, per_class (C accuracies) and confusion (C, C).

    truth: int64 (N,), -1 where unknown: such rows do not count. Accuracies are shares in [0, 1], or None where there
    is nothing to count. confusion[t, p]: how many images of class t are called p.
    """
    classes, known = probs.shape[1], truth >= 0
    confusion = (truth * classes + probs.argmax(1))[known].bincount(minlength=classes**2).view(classes, classes)
    right, of_class = confusion.diag().tolist(), confusion.sum(1).tolist()
    accuracy = sum(right) / sum(of_class) if known.any() else None
    return dict(
        accuracy=accuracy, per_class=[r / n if n else None for r, n in zip(right, of_class)], confusion=confusion
    )


def load_student(path):
    """(student, class names) from a run's model.pt, of which no code is run. Images are student.size px square."""
    model = torch.load(path, map_location="cpu", weights_only=True)
    student = Student(model["arch"], len(model["classes"]), model["size"])
    student.load_state_dict(model["student"])
    return student.eval(), model["classes"]


# ==== Data sets: each image is read once, for the student and for CLIP ================================================
@dataclass
class Images:
    """N images at the student's size, and what the teacher says of them."""

    names: list  # N distinct strings
    pixels: torch.Tensor  # uint8 (N, 3, S, S)
    truth: torch.Tensor  # int64 (N,), -1 where unknown; for evaluation alone
    probs: torch.Tensor = None  # float32 (N, C), the teacher's, where it was asked
    features: torch.Tensor = None  # float32 (N, D), the teacher's unit image features, where it has any


def handwritten_digits():
    """scikit-learn's 1797 real digits, 8 x 8 pixels, as (PIL image, label) pairs. They come with that package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    gray = (digits.images * (255 / 16)).round().astype("uint8")  # from 0..16
    return list(zip(map(Image.fromarray, gray), digits.target.tolist()))


# For each data set: how to get it, (root, train) -> (PIL image, label) pairs, or "undivided" (root) -> those of which a
# fifth is held out; CLIP's prompts and class names, as in openai/CLIP, data/prompts.md; and its defaults of settings.
DATASETS = {
    "digits": dict(
        undivided=lambda root: handwritten_digits(),
        templates=['a photo of the number: "{}".', "a photo of the digit {}.", "the handwritten digit {}."],
        classes=["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        settings=dict(size=16, arch="resnet8", views="writing", clip="offline", class_prior="uniform"),
    ),
    "mnist": dict(
        divided=lambda root, train: torchvision.datasets.MNIST(root, train, download=True),
        templates=['a photo of the number: "{}".'], classes=list("0123456789"),
        settings=dict(views="writing", class_prior="uniform"),
    ),
    "cifar10": dict(
        divided=lambda root, train: torchvision.datasets.CIFAR10(root, train, download=True),
        templates=[f"a {kind}photo of {a} {{}}." for a in ("a", "the") for kind in
                   ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")]
                + [f"a photo of {a} {{}}." for a in ("a small", "the small", "a big", "the big")],
        classes=["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        settings=dict(class_prior="uniform"),
    ),
    "eurosat": dict(
        undivided=lambda root: torchvision.datasets.EuroSAT(root, download=True),
        templates=[f"a centered satellite photo of {a}{{}}." for a in ("", "a ", "the ")],
        classes=["annual crop land", "forest", "brushland or shrubland", "highway or road",
                 "industrial buildings or commercial buildings", "pasture land", "permanent crop land",
                 "residential buildings or homes or apartments", "river", "lake or sea"],
        settings=dict(size=64, views="overhead", class_prior="uniform"),
    ),
}  # fmt: skip


def open_dataset(name, root="data", split="train"):
    """A data set of the table: (PIL image, label) pairs, and the images' names, which are their numbers.

    split: "train", the unlabeled images, or "test", the held-out ones. Missing data sets are downloaded to `root`.
    UserError: no such data set, no network, or an archive that was cut off.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: choose from {', '.join(DATASETS)}")
    recipe = DATASETS[name]
    try:
        source = recipe["divided"](root, split == "train") if "divided" in recipe else recipe["undivided"](root)
    except (OSError, RuntimeError) as error:
        if type(error) is RuntimeError and "corrupted" not in str(error):  # torchvision's word for a cut-off file
            raise
        remedy = f"Without network copy {root} from elsewhere; what an earlier download left in it, delete"
        raise UserError(f"cannot get {name}: {error}. {remedy}") from error
    kept = range(len(source))
    if "undivided" in recipe:
        from sklearn.model_selection import train_test_split

        labels = [source[i][1] for i in kept] if isinstance(source, list) else source.targets
        kept = sorted(train_test_split(kept, test_size=0.2, stratify=labels, random_state=0)[split == "test"])
    return torch.utils.data.Subset(source, kept), [f"{i:05d}" for i in kept]


def load_images(config, split, clip=None):
    """Read a data set of the table once: Images without probs. UserError: see open_dataset().

    clip: a Clip, for the features. They are kept in the folder config.cache, a file for each data set, split and model,
    and taken from there as long as there is one for each image and the first eight come out the same again.
    """
    source, names = open_dataset(config.dataset, config.root, split)
    title, features = f"{config.dataset}-{split}", None
    if clip and config.cache != "none":
        file = Path(config.cache).expanduser() / f"{title}-{re.sub('[^A-Za-z0-9.]+', '-', clip.name)}.npy"
        if file.exists():
            kept = torch.from_numpy(np.load(file, allow_pickle=False))
            first = clip.encode_images(torch.stack([clip.prepare(source[i][0]) for i in range(min(8, len(source)))]))
            features = kept if len(kept) == len(source) and torch.allclose(kept[:8], first, atol=0.01) else None
    ask = clip and features is None

    def read(i):
        image, label = source[i]
        return square(image, config.size), clip.prepare(image) if ask else None, int(label)

    pixels, rows, truth = [], [], []
    for batch in read_ahead(read, len(source), title):
        small, views, labels = zip(*batch)
        pixels.append(torch.stack(small))
        truth += labels
        rows += [clip.encode_images(torch.stack(views))] if ask else []
    features = torch.cat(rows) if ask else features
    if ask and config.cache != "none":
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda draft: np.save(draft, features.numpy()))
    return Images(names, torch.cat(pixels), torch.tensor(truth), features=features)


def read_ahead(read, n, title, batch=128):
    """Lists of [read(0), ..., read(batch - 1)] and so on up to n, read by threads while the one before is in use."""
    with ThreadPoolExecutor(min(os.cpu_count(), 16)) as pool, tqdm(desc=title, total=n, disable=None) as bar:
        ahead = pool.map(read, range(min(batch, n)))
        for start in range(batch, n + batch, batch):
            present, ahead = list(ahead), pool.map(read, range(start, min(start + batch, n)))
            yield present
            bar.update(len(present))


def square(image, size):
    """PIL image -> uint8 (3, size, size): its short side to `size`, then the centre, as CLIP's preprocessing does."""
    image = TF.resize(image.convert("RGB"), size, TF.InterpolationMode.BICUBIC)
    return TF.pil_to_tensor(TF.center_crop(image, size))


# ==== CLIP ============================================================================================================

OFFLINE_CLIP = Path(__file__).resolve().parent / "tclip_app/offline_clip.pt"  # tiny; it knows digits alone
OPENAI_CLIP = "RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"


class Clip:
    """A CLIP model, whichever package it comes from; in half precision on CUDA.

    name: "offline"; one of OPENAI_CLIP, by the package `clip` where it is installed, else by open_clip; "arch:tag" or
    "arch:FILE" of open_clip. prepare: its preprocessing, PIL image -> float32 (3, S, S). temperature: its own,
    1 / exp(logit_scale). UserError: unknown name, or a file is missing.
    """

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
    try:
        import clip
    except ImportError:
        clip = None
    if name in OPENAI_CLIP and hasattr(clip, "load"):  # PyPI's "clip" is another program
        return *clip.load(name, "cpu"), partial(clip.tokenize, truncate=True)
    import open_clip

    if name == "offline":
        if not OFFLINE_CLIP.exists():
            raise UserError(
                f"the CLIP for digits is missing: copy tclip's {OFFLINE_CLIP.name} to {OFFLINE_CLIP.parent}"
            )
        weights = torch.load(OFFLINE_CLIP, weights_only=True)
        model = open_clip.model.build_model_from_openai_state_dict(weights, cast_dtype=None)
        return model, open_clip.image_transform(model.visual.image_size, is_train=False), open_clip.tokenize
    arch, _, tag = name.partition(":")
    if name in OPENAI_CLIP:
        arch, tag = re.sub("[/@]", "-", name).removesuffix("px"), "openai"
    known = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in known and not (arch in open_clip.list_models() and Path(tag).is_file()):
        raise UserError(
            f"--clip {name}: choose from offline, {', '.join(OPENAI_CLIP)}, arch:tag or arch:FILE of open_clip"
        )
    quick_gelu = open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False)  # else open_clip would only warn
    model, _, prepare = open_clip.create_model_and_transforms(arch, tag, force_quick_gelu=quick_gelu)
    return model, prepare, open_clip.get_tokenizer(arch)


# ==== A run ===========================================================================================================
def read_dataset(config):
    """The data set's unlabeled and held-out Images, named by CLIP, and the class names."""
    clip = Clip(config.clip, pick_device(config.device))
    unlabeled, heldout = (load_images(config, split, clip) for split in ("train", "test"))
    recipe = DATASETS[config.dataset]
    prompts = text_classifier(clip.encode_texts, recipe["classes"], recipe["templates"])  # (C, D)
    for images in (unlabeled, heldout):
        images.probs = zero_shot_probs(images.features, prompts, clip.temperature)
    return unlabeled, heldout, recipe["classes"]


def run(config, read=read_dataset, resumed=False):
    """A whole run: images, pseudo-labels, training, evaluation. The first process writes the results to its folder.

    read: function, config -> (unlabeled Images, held-out Images or None, C class names). resumed: the run has begun
    before, in the folder config.out. Returns the settings, and the summary (None on other processes than the first).
    """
    started, device, rank, world = time.time(), pick_device(config.device), 0, 1
    Student(config.arch, 2)  # an unknown arch is told before anything is read
    if dist.is_torchelastic_launched():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=1))  # one may be at a download
        rank, world = dist.get_rank(), dist.get_world_size()
    claimed = [config if resumed or rank else claim_folder(config)]
    if world > 1:
        dist.broadcast_object_list(claimed)
    (config,) = claimed
    try:
        if rank > 0:
            dist.barrier()  # the first alone downloads, and asks CLIP: its features are kept
        unlabeled, heldout, classes = read(config)
        if rank == 0 and world > 1:
            dist.barrier()
        student, labels = train(config, unlabeled.pixels, unlabeled.probs, unlabeled.features, Path(config.out))
    except KeyboardInterrupt:
        raise UserError(f"stopped; go on with --resume {config.out}") from None
    summary = write_results(config, unlabeled, heldout, classes, student, labels, started) if rank == 0 else None
    if world > 1:
        dist.barrier()  # nobody leaves before the results are written: torchrun would stop the first
        dist.destroy_process_group()
    return config, summary


def claim_folder(config):
    """Make the folder of the results, this run's own, with its config.json: two runs begun together get two folders."""
    for i in range(1, 10**6):
        out = Path(config.out or f"runs/{config.dataset}" + f"-{i}" * (i > 1))
        try:
            out.mkdir(parents=True)  # fails where another run was quicker
        except FileExistsError:
            if config.out:
                raise UserError(f"{out} exists: choose another --out, or go on with --resume {out}") from None
            continue
        config = replace(config, out=str(out))
        write_whole(out / "config.json", partial(json.dump, asdict(config), indent=1), "w")
        return config


def write_results(config, unlabeled, heldout, classes, student, labels, started):
    """labels.csv, model.pt, summary.json and, where truth is known, noise.png. Returns the summary, a dict."""
    out, truth = Path(config.out), unlabeled.truth
    said = dict(teacher=unlabeled.probs, label=labels.table.float().cpu(), student=predict(student, unlabeled.pixels))
    scores = {f"unlabeled_{who}": score(probs, truth) for who, probs in said.items()}
    if heldout:
        scores["heldout_student"] = score(predict(student, heldout.pixels), heldout.truth)
        scores["heldout_teacher"] = score(heldout.probs, heldout.truth)
    summary = {f"{who}_accuracy": s["accuracy"] for who, s in scores.items()}
    summary |= {f"{who}_per_class": dict(zip(classes, s["per_class"])) for who, s in scores.items()}
    summary["agreement"] = score(said["student"], said["teacher"].argmax(1))["accuracy"]
    kind = torch.cuda.get_device_name() if next(student.parameters()).is_cuda else config.device
    summary |= dict(images=len(truth), device=kind, torch=torch.__version__, seconds=round(time.time() - started, 1))

    columns = dict(file=unlabeled.names)
    for who, prefix in dict(teacher="teacher_", label="", student="student_").items():
        confidence, number = said[who].max(1)
        columns |= {f"{prefix}label": [classes[c] for c in number], f"{prefix}confidence": confidence.tolist()}
    if (truth >= 0).any():
        columns["truth"] = [classes[c] if c >= 0 else "" for c in truth]
        write_whole(
            out / "noise.png", partial(draw_noise, classes, scores["unlabeled_teacher"], scores["unlabeled_student"])
        )
    write_csv(out / "labels.csv", [dict(zip(columns, row)) for row in zip(*columns.values())])
    model = dict(arch=student.arch, size=student.size, classes=classes, student=student.state_dict())
    write_whole(out / "model.pt", partial(torch.save, model))
    write_whole(out / "summary.json", partial(json.dump, summary, indent=1), "w")
    return summary


def draw_noise(classes, teacher, student, file):
    """Picture (PNG): confusion matrices of two score()s side by side, as shares of the true class, in %."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    side = min(4 + 0.18 * len(classes), 20)
    figure = Figure((2 * side + 1, side), layout="compressed")
    for ax, who, s in zip(figure.subplots(1, 2), ("teacher", "student"), (teacher, student)):
        shares = 100 * s["confusion"] / s["confusion"].sum(1, keepdim=True).clamp(min=1)
        look = dict(include_values=len(classes) <= 20, values_format=".0f", xticks_rotation=90)  # else a blur
        ConfusionMatrixDisplay(shares.numpy(), display_labels=classes).plot(ax=ax, **look)
        ax.set_title(f"{who}: {s['accuracy']:.1%} right")
    figure.savefig(file, dpi=120, format="png", bbox_inches="tight")


# ==== Files and command line ==========================================================================================
def write_whole(path, write, mode="wb"):
    """Let write(file) fill a draft, then put it into place at once: `path` is never half-written."""
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, mode, **(dict(newline="", encoding="utf-8") if mode == "w" else {})) as file:
            write(file)
        os.replace(draft, path)
    except OSError as error:  # the disk is full, say
        raise UserError(f"cannot write {path}: {error}") from error


def write_csv(path, rows):
    """Rows (dicts with the same keys) as a csv file. What begins like a formula gets an apostrophe before it."""
    cells = [[re.sub(r"^(?='*[=+\-@\t\r])", "'", v) if type(v) is str else v for v in row.values()] for row in rows]
    write_whole(path, lambda file: csv.writer(file).writerows([list(rows[0]), *cells]), "w")


def add_settings(parser, kind):
    """A flag for each field of the dataclass `kind`. What is not given on the command line is not in the result."""
    for f in fields(kind):
        words = f": {', '.join(f.metadata['allowed'])}" if f.type is str and f.metadata["allowed"] else ""
        default = f" [{f.default}]" if f.default not in (None, False) else ""
        how = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.name.upper())
        help = f"{f.metadata['help']}{words}{default}".replace("%", "%%")
        parser.add_argument(f"--{f.name.replace('_', '-')}", help=help, default=argparse.SUPPRESS, **how)


def resume(kind, folder, given, places=("root", "cache", "device")):
    """The settings, a dataclass `kind`, of the run in `folder`. Those that say where, not what, may be given anew."""
    if fixed := given.keys() - set(places):
        raise UserError(f"--resume takes --{min(fixed).replace('_', '-')} from {folder}/config.json: leave it out")
    file = Path(folder, "config.json")
    saved = json.loads(file.read_text()) if file.is_file() else {}
    if saved.keys() != {f.name for f in fields(kind)}:
        raise UserError(f"--resume {folder}: there is no config.json of a run, or of another command or version")
    return kind(**saved | given | dict(out=str(folder)))


def main(argv=None):
    """The command line."""
    what, _, usage, *_ = __doc__.split("\n\n")
    style = dict(usage="%(prog)s [--setting value ...]", formatter_class=argparse.RawTextHelpFormatter)
    parser = argparse.ArgumentParser("tclip.py", description=f"{what}\n\n{usage}", **style)
    add_settings(parser, Config)
    parser.add_argument("--resume", metavar="RUN", help="go on with the interrupted run in this folder")
    given = vars(parser.parse_args(argv))
    folder, recipe = given.pop("resume"), DATASETS.get(given.get("dataset", Config.dataset), dict(settings={}))
    config = resume(Config, folder, given) if folder else Config(**recipe["settings"] | given)
    config, summary = run(config, resumed=bool(folder))
    if summary:
        for images in ("unlabeled", "heldout"):
            teacher, student = (summary[f"{images}_{who}_accuracy"] for who in ("teacher", "student"))
            print(f"{images} images right: teacher {teacher:.1%}, student {student:.1%}")
        print(f"{summary['seconds']:.0f} s on {summary['device']}; results in {config.out}")


if __name__ == "__main__":
    main()
