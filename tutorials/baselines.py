"""Other ways to learn from the same noisy pseudo-labels, to compare tclip with: METHODS. And tclip with one setting
changed, to see what that setting is worth: STUDY.

    student, labels = METHODS["GCE"].run(config, images, probs)

Each method gets what tclip.train() gets, and nothing else: a Config, the unlabeled images and the teacher's
probabilities. Network, augmentation, two views of each image a step, batch size, epochs, optimiser and learning rate
are the same for all. No method reads the truth in training. Hyperparameters of the others are those of their papers;
those of tclip, and what all have in common, were chosen by the accuracy on the digits, on some satellite images and,
for the weight of the contrastive loss, on some images of CIFAR-10.

Where settings of tclip.train() make a method, METHODS says which. The others differ in the loss (one shared loop,
train_with_loss) or train two networks (co_teaching, divide_mix).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tclip.py of this checkout, installed or not
import tclip

# ======================================================================================================================
# What the training loops share, each as tclip.train() does it
# ======================================================================================================================


def new_student(config, images):
    """A Student on its device, and its optimiser."""
    student = tclip.Student(config.arch, len(images.classes), config.size)
    student.to(tclip.pick_device(config.device), memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    return student, optimizer


def epochs(config):
    """The epochs 0, 1, ... with a progress bar; the draws of an epoch depend on no earlier one."""
    for epoch in tqdm(range(config.epochs), "student", unit="epoch", disable=None):
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))
        yield epoch


def batches(config, optimizer, members, epoch):
    """One pass over `members`, int64 (N,), in random order: batches of them. Sets the learning rate of each step."""
    steps = math.ceil(len(members) / config.batch_size)
    order = torch.randperm(len(members), device=members.device)
    for step, index in enumerate(members[order].tensor_split(steps)):
        for group in optimizer.param_groups:
            group["lr"] = tclip.learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
        yield index


def two_views(config, pixels):
    """uint8 (B, 3, H, W) -> float (2B, 3, H, W): rows i and i + B are random views of image i."""
    return tclip.augment(pixels, views=2, **tclip.VIEWS[config.views])


def forward(student, views):
    """Logits, float32 (2B, C): bfloat16 inside, where that is fast."""
    kind = views.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=tclip.has_fast_bfloat16(views.device)):
        logits, _ = student(views.contiguous(memory_format=torch.channels_last))
    return logits.float()


def descend(optimizer, loss):
    """One step of the optimiser."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def mean_of_views(values):
    """Mean over the two views of each image: (2B, ...) -> (B, ...)."""
    return values.unflatten(0, (2, -1)).mean(0)


# ======================================================================================================================
# Methods that are a loss. A loss is made from the teacher's probabilities (N, C) once, and called with logits (2B, C)
# of two views and the batch's indices (B,). If it keeps labels of its own they are its `table` (N, C).
# ======================================================================================================================


def train_with_loss(config, images, probs, loss, **settings):
    """tclip.train() with the loss `loss(probs, **settings)`. Returns (student, that loss)."""
    torch.manual_seed(config.seed)
    student, optimizer = new_student(config, images)
    device = tclip.pick_device(config.device)
    pixels, criterion = images.pixels.to(device), loss(probs.to(device), **settings)
    everything = torch.arange(len(pixels), device=device)
    for epoch in epochs(config):
        student.train()
        for index in batches(config, optimizer, everything, epoch):
            descend(optimizer, criterion(forward(student, two_views(config, pixels[index])), index))
    return student, criterion


class GCE:
    """Generalised cross-entropy, (1 - p_y^q) / q: cross-entropy for q -> 0, mean absolute error for q = 1.

    Zhang and Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels".
    """

    def __init__(self, probs, q):
        self.labels, self.q = probs.argmax(1), q

    def __call__(self, logits, index):
        log_p = -F.cross_entropy(logits, self.labels[index].repeat(2), reduction="none")  # (2B,)
        return ((1 - (self.q * log_p).exp()) / self.q).mean()  # not p**q, whose gradient at p = 0 is not finite


class SCE:
    """Symmetric cross-entropy: alpha * CE + beta * reverse CE, -sum_k p_k log(y_k) with log(0) set to A < 0.

    With one-hot y the reverse half is -A (1 - p_y). Wang et al. 2019, "Symmetric Cross Entropy for Robust Learning
    with Noisy Labels".
    """

    def __init__(self, probs, alpha, beta, A):
        self.labels, self.alpha, self.beta, self.A = probs.argmax(1), alpha, beta, A

    def __call__(self, logits, index):
        cross_entropy = F.cross_entropy(logits, self.labels[index].repeat(2), reduction="none")  # (2B,)
        reverse = -self.A * (1 - (-cross_entropy).exp())
        return (self.alpha * cross_entropy + self.beta * reverse).mean()


class ELR:
    """Early-learning regularisation: CE + lambda log(1 - <p, t>), t a running mean of the image's own predictions.

    t <- beta t + (1 - beta) p whenever an image is seen; p is the mean of its two views there. As published, t starts
    at zero and p is kept within 1e-4 of the ends. Liu et al. 2020, "Early-Learning Regularization Prevents Memorization
    of Noisy Labels".
    """

    def __init__(self, probs, beta, weight):
        self.labels, self.beta, self.weight = probs.argmax(1), beta, weight
        self.table = torch.zeros_like(probs, dtype=torch.float32)  # t

    def __call__(self, logits, index):
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)  # (2B, C)
        seen = mean_of_views(p.detach())
        self.table[index] = self.beta * self.table[index] + (1 - self.beta) * seen / seen.sum(1, keepdim=True)
        agreement = (self.table[index].repeat(2, 1) * p).sum(1)  # (2B,)
        return F.cross_entropy(logits, self.labels[index].repeat(2)) + self.weight * (1 - agreement).log().mean()


# ======================================================================================================================
# Co-teaching
# ======================================================================================================================


def co_teaching(config, images, probs, forget_epochs):
    """Two networks, each of which learns from the images of a batch that are easy for the *other*.

    The share that is forgotten grows in `forget_epochs` to the share of wrong labels. The paper takes that as known;
    here it is estimated as the teacher's mean doubt, 1 - its mean confidence. Han et al. 2018, "Co-teaching: Robust
    Training of Deep Neural Networks with Extremely Noisy Labels", algorithm 1. Returns (the first network, None).
    """
    torch.manual_seed(config.seed)
    (first, optimizer), (second, second_optimizer) = new_student(config, images), new_student(config, images)
    optimizer.add_param_group(second_optimizer.param_groups[0])  # the losses have no network in common: one step does
    device = tclip.pick_device(config.device)
    pixels, labels = images.pixels.to(device), probs.argmax(1).to(device)
    everything = torch.arange(len(pixels), device=device)
    forget_rate = 1 - probs.amax(1).mean().item()
    for epoch in epochs(config):
        first.train(), second.train()
        for index in batches(config, optimizer, everything, epoch):
            views, targets = two_views(config, pixels[index]), labels[index].repeat(2)
            losses = [F.cross_entropy(forward(net, views), targets, reduction="none") for net in (first, second)]
            descend(optimizer, sum(exchange(*map(mean_of_views, losses), forget_rate * min(epoch / forget_epochs, 1))))
    return first, None


def exchange(first, second, forget):
    """Losses of the two networks, each averaged over the small-loss images of the other.

    first, second: each network's losses of the same images, (B,). forget: the share of images left out.
    """
    keep = max(1, int((1 - forget) * len(first)))
    easy_for_first, easy_for_second = first.argsort()[:keep], second.argsort()[:keep]
    return first[easy_for_second].mean(), second[easy_for_first].mean()


# ======================================================================================================================
# DivideMix. Li, Socher, Hoi 2020, "DivideMix: Learning with Noisy Labels as Semi-supervised Learning"
# ======================================================================================================================


def divide_mix(config, images, probs, warm_up, **settings):
    """Two networks; each tells the other which labels to believe, and the rest is learned without labels.

    After `warm_up` epochs a two-component mixture is fitted to each network's losses once an epoch; images of the
    low-loss component keep their label. `settings` are those of divided_epoch(). Algorithm 1 of the paper. Returns
    (both networks as one, None), as the paper evaluates them.
    """
    torch.manual_seed(config.seed)
    networks = [new_student(config, images) for _ in range(2)]
    device = tclip.pick_device(config.device)
    pixels, labels = images.pixels.to(device), probs.argmax(1).to(device)
    for epoch in epochs(config):
        divisions = [None, None]
        if epoch >= warm_up:  # both, before either is trained
            divisions = [clean_probability(label_loss(student, pixels, labels)).to(device) for student, _ in networks]
        for network, (other, _), clean in zip(networks, networks[::-1], divisions[::-1]):  # the other's division
            if clean is None:
                warm_up_epoch(config, *network, pixels, labels, epoch)
            else:
                divided_epoch(config, *network, other, pixels, labels, clean, epoch, epoch - warm_up, **settings)
    return Average(*(student for student, _ in networks)), None


def warm_up_epoch(config, student, optimizer, pixels, labels, epoch):
    """Cross-entropy minus entropy: the paper's warm-up for noise that, as a teacher's, depends on the class (3.1)."""
    student.train()
    for index in batches(config, optimizer, torch.arange(len(pixels), device=pixels.device), epoch):
        logits = forward(student, two_views(config, pixels[index]))
        negative_entropy = (logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        descend(optimizer, F.cross_entropy(logits, labels[index].repeat(2)) + negative_entropy)


def divided_epoch(
    config, student, optimizer, other, pixels, labels, clean, epoch, divided_epochs,
    threshold, temperature, alpha, unlabeled_weight, ramp,
):  # fmt: skip
    """One pass over the images whose label is believed, a batch of the others beside each of their batches.

    clean: (N,), the chance that a label is right; above `threshold` it is believed. divided_epochs: how many such
    epochs came before this one; the unlabeled loss gets its full weight over the first `ramp` of them.
    """
    believed = clean > threshold
    if believed.all() or not believed.any():  # nothing to divide
        return warm_up_epoch(config, student, optimizer, pixels, labels, epoch)
    labeled, unlabeled = believed.nonzero().flatten(), (~believed).nonzero().flatten()
    steps, rest = math.ceil(len(labeled) / config.batch_size), forever(unlabeled, config.batch_size)
    student.train(), other.eval()
    for step, index in enumerate(batches(config, optimizer, labeled, epoch)):
        x, u = two_views(config, pixels[index]), two_views(config, pixels[next(rest)])  # (2L, 3, H, W), (2U, ...)
        with torch.no_grad():
            one_hot = F.one_hot(labels[index], student.classifier.out_features).float()
            refined = co_refine(one_hot, clean[index], forward(student, x).softmax(1))  # (L, C)
            guessed = co_guess(forward(student, u).softmax(1), forward(other, u).softmax(1))  # (U, C)
            targets = sharpen(torch.cat([refined, refined, guessed, guessed]), temperature)
        views, targets = mixup(torch.cat([x, u]), targets, alpha)
        weight = unlabeled_weight * min((divided_epochs + step / steps) / ramp, 1)
        descend(optimizer, semi_supervised_loss(forward(student, views), targets, len(x), weight))


def label_loss(student, pixels, labels):
    """Cross-entropy of each image, without augmentation, with its label: (N,) on the CPU."""
    p = tclip.predict(student, pixels)  # (N, C)
    return -p.gather(1, labels.cpu()[:, None]).squeeze(1).clamp_min(1e-30).log()


def clean_probability(losses):
    """The chance that a label is right, (N,): of the low-loss one of two Gaussians fitted to the losses, (N,)."""
    from sklearn.mixture import GaussianMixture

    span = (losses.max() - losses.min()).clamp_min(1e-12)  # no division by zero where all are equal
    column = ((losses - losses.min()) / span).double().numpy()[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(column)
    return torch.from_numpy(mixture.predict_proba(column)[:, mixture.means_.argmin()]).float()


def forever(members, size):
    """Batches of `members` in random order, begun again whenever they are through."""
    while True:
        yield from members[torch.randperm(len(members), device=members.device)].split(size)


def co_refine(one_hot, clean, p):
    """w y + (1 - w) p, (L, C): y the label, w (L,) its chance by the other network, p (2L, C) the own predictions."""
    return clean[:, None] * one_hot + (1 - clean[:, None]) * mean_of_views(p)


def co_guess(p, other_p):
    """The mean of both networks' predictions (2U, C) of both views: (U, C)."""
    return (mean_of_views(p) + mean_of_views(other_p)) / 2


def sharpen(p, temperature):
    """p^(1 / temperature), rows back on the simplex."""
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def mixup(inputs, targets, alpha):
    """Each row mixed with a random other; its own share is one draw of Beta(alpha, alpha), and at least a half."""
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    share, partner = max(share, 1 - share), torch.randperm(len(inputs), device=inputs.device)
    return share * inputs + (1 - share) * inputs[partner], share * targets + (1 - share) * targets[partner]


def semi_supervised_loss(logits, targets, labeled, weight):
    """Cross-entropy of the first `labeled` rows, `weight` x squared error of the rest, and the penalty.

    The penalty is the divergence from equally frequent classes to the mean prediction, lest all become one class.
    """
    log_p, p = logits.log_softmax(1), logits.softmax(1)  # (2L + 2U, C)
    cross_entropy = -(targets * log_p)[:labeled].sum(1).mean()
    squared_error = (p - targets)[labeled:].square().mean()
    penalty = -(p.mean(0) * p.shape[1]).log().mean()
    return cross_entropy + weight * squared_error + penalty


class Average(nn.Module):
    """Two students as one: the mean of their logits, and no embedding."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return (self.first(x)[0] + self.second(x)[0]) / 2, None


# ======================================================================================================================
# The table of methods
# ======================================================================================================================


def soft(probs):
    """The teacher's probabilities as they are."""
    return probs


def hard(probs):
    """The teacher's first choice, one-hot."""
    return F.one_hot(probs.argmax(1), probs.shape[1]).float()


def smoothed(probs):
    """The teacher's first choice, and a tenth of the label spread over all classes."""
    return 0.9 * hard(probs) + 0.1 / probs.shape[1]


@dataclass(frozen=True)
class Method:
    """source: where it is published. labels: what is made of the teacher's probabilities first. train: a function like
    tclip.train(). settings: fields of Config. own: keyword arguments of `train`, the published hyperparameters."""

    source: str
    labels: Callable = soft
    train: Callable = tclip.train
    settings: dict = field(default_factory=dict)
    own: dict = field(default_factory=dict)

    def run(self, config, images, probs):
        """Train. Returns (student, the labels (N, C) that came of the teacher's, or None where they stayed)."""
        config = replace(config, **self.settings)
        student, labels = self.train(config, images, self.labels(probs), **self.own)
        return student, None if config.label_momentum == 1 else getattr(labels, "table", None)


FIXED = dict(label_momentum=1.0, class_prior="none", label_neighbours=0)  # labels stay as they are given
NO_C3L = dict(c3l_weight=0.0)
SIMCLR = dict(c3l_weight=1.0, positives="instance", negatives="all", temperature=0.5)
SUPCON = dict(c3l_weight=1.0, positives="class", negatives="all", temperature=0.1)

METHODS = {
    "cross-entropy": Method("the plain way", hard, settings=FIXED | NO_C3L),
    "soft labels": Method("distillation, Hinton et al. 2015", soft, settings=FIXED | NO_C3L),
    "balanced labels": Method("soft labels by tclip.balance()", tclip.balance, settings=FIXED | NO_C3L),
    "label smoothing": Method("Szegedy et al. 2016", smoothed, settings=FIXED | NO_C3L),
    "GCE": Method("Zhang and Sabuncu 2018", train=train_with_loss, own=dict(loss=GCE, q=0.7)),
    "SCE": Method("Wang et al. 2019", train=train_with_loss, own=dict(loss=SCE, alpha=0.1, beta=1.0, A=-4.0)),
    "ELR": Method("Liu et al. 2020", train=train_with_loss, own=dict(loss=ELR, beta=0.7, weight=3.0)),
    "SimCLR + CE": Method("Chen et al. 2020", hard, settings=FIXED | SIMCLR),
    "SupCon + CE": Method("Khosla et al. 2020", hard, settings=FIXED | SUPCON),
    "Co-teaching": Method("Han et al. 2018", train=co_teaching, own=dict(forget_epochs=10)),
    "DivideMix": Method(
        "Li et al. 2020",
        train=divide_mix,
        own=dict(warm_up=10, threshold=0.5, temperature=0.5, alpha=4.0, unlabeled_weight=25.0, ramp=16),
    ),
    "tclip": Method("this project, after Huang et al. 2022"),
    "tclip without C3L": Method("half of it", settings=NO_C3L),
    "tclip with fixed balanced labels": Method("no ensemble labels, but balance", settings=dict(label_momentum=1.0)),
    "tclip without ensemble labels": Method("neither", settings=dict(label_momentum=1.0, class_prior="none")),
}


def changed(**settings):
    """An entry of STUDY: tclip with these settings in place of its own."""
    name = " + ".join(f"{field.replace('_', ' ')} {value}" for field, value in settings.items())
    return name, Method("this project", settings=settings)


STUDY = {"tclip": METHODS["tclip"], "hard labels at the start": Method("this project", hard)} | dict(
    [
        *(changed(positives=value) for value in ("class", "instance")),
        *(changed(negatives=value) for value in ("all", "same")),
        changed(positives="class", negatives="all"),
        changed(positives="instance", negatives="all"),
        *(changed(temperature=value) for value in (0.2, 1.0)),
        *(changed(c3l_weight=value) for value in (0.3, 3.0)),
        *(changed(label_momentum=value) for value in (0.0, 0.8)),
        *(changed(label_neighbours=value) for value in (0, 5, 80)),
        *(changed(label_sharpness=value) for value in (1.0, 4.0)),
        changed(class_prior="none"),
        *(changed(batch_size=value) for value in (32, 64, 256)),
    ]
)
