"""Other ways to learn from the same noisy pseudo-labels, to compare tclip with: METHODS and STARTED. And tclip with one
thing changed, to see what that is worth: STUDY.

    student, labels = METHODS["GCE"].run(config, images)

Network, views, two views of each image a step, batch size, epochs, optimiser and learning rate are the same for all,
and so is the training step, tclip.train(): a method is its targets and its objective. Co-teaching trains
two networks, in a loop of its own. No method reads the truth. Hyperparameters of the others are those of their papers.
"""

import math
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tclip.py of this checkout, installed or not
import tclip

# ==== Targets: what is made of the teacher's probabilities (N, C) before training =====================================


def soft(probs):
    """The teacher's probabilities as they are."""
    return probs


def hard(probs):
    """The teacher's first choice, one-hot."""
    return F.one_hot(probs.argmax(1), probs.shape[1]).float()


def smoothed(probs):
    """The teacher's first choice, and a tenth of the label spread over all classes. Szegedy et al. 2016."""
    return 0.9 * hard(probs) + 0.1 / probs.shape[1]


def balanced(probs, tolerance=1e-3, iterations=1000):
    """The nearest soft labels with equally frequent classes, by optimal transport (Sinkhorn and Knopp).

    Weights for the classes are found such that no class's mass is further than `tolerance` from N / C, or after so
    many iterations: answers that are certain cannot be balanced. As in Asano et al. 2020.
    """
    p = probs.double().clamp_min(1e-6)  # zero would stay zero for ever
    weights = torch.ones_like(p[0])
    for _ in range(iterations):
        shares = (p * weights / (p @ weights)[:, None]).mean(0) * len(weights)  # (C,), all 1 in the end
        if (shares - 1).abs().max() < tolerance:
            break
        weights = weights / shares
    return (p * weights / (p @ weights)[:, None]).float()


# ==== Objectives, in place of tclip.tclip_objective() =================================================================
# logits (2B, C) and unit embeddings z (2B, D) of two views; labels.targets(index), (B, C), are the targets made above.


def classify(logits, z, index, labels, config, loss=F.cross_entropy):
    """`loss`, a function of logits and targets, both (2B, C), and nothing else."""
    return loss(logits, labels.targets(index).repeat(2, 1)), torch.zeros((), device=logits.device)


def contrast(logits, z, index, labels, config, by_class, temperature):
    """Cross-entropy and contrastive_loss(): SupCon's where images of one class are positives, otherwise SimCLR's."""
    targets = labels.targets(index)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)  # (2B, 2B)
    classes = targets.argmax(1).repeat(2)  # (2B,)
    positives = (classes[:, None] == classes) & ~itself if by_class else itself.roll(len(index), 0)
    return F.cross_entropy(logits, targets.repeat(2, 1)), contrastive_loss(z, positives, temperature)


def contrastive_loss(z, positives, temperature):
    """- log( exp(s_ij) / sum_k exp(s_ik) ), s_ij = <z_i, z_j> / temperature, all others k: the mean over the positives
    j of a row, and then over the rows.

    z: unit rows (2B, D). positives: bool (2B, 2B), at least one a row and never itself. With the other view of the same
    image it is SimCLR's (Chen et al. 2020), with all images of the class SupCon's (Khosla et al. 2020).
    """
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    shares = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
    return -((positives * shares).sum(1) / positives.sum(1)).mean()


def gce(logits, targets, q=0.7):
    """Generalised cross-entropy, (1 - p_y^q) / q: cross-entropy for q -> 0, mean absolute error for q = 1.

    Zhang and Sabuncu 2018, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels".
    """
    log_p = -F.cross_entropy(logits, targets, reduction="none")  # (2B,)
    return ((1 - (q * log_p).exp()) / q).mean()  # not p**q, whose gradient at p = 0 is not finite


def sce(logits, targets, alpha=0.1, beta=1.0, A=-4.0):
    """Symmetric cross-entropy: alpha CE + beta reverse CE, -sum_k p_k log(y_k) with log(0) set to A.

    With one-hot y the reverse half is -A (1 - p_y). Wang et al. 2019, "Symmetric Cross Entropy for Robust Learning
    with Noisy Labels".
    """
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")  # (2B,)
    return (alpha * cross_entropy - beta * A * (1 - (-cross_entropy).exp())).mean()


class ELR:
    """Early-learning regularisation: CE + weight * log(1 - <p, t>), t a running mean of the image's own predictions.

    t <- beta t + (1 - beta) p whenever an image is seen; p is the mean of its two views there. As published, t starts
    at zero and p is kept within 1e-4 of the ends. Liu et al. 2020, "Early-Learning Regularization Prevents Memorization
    of Noisy Labels". table: t, (N, C).
    """

    def __init__(self, beta=0.7, weight=3.0):
        self.beta, self.weight, self.table = beta, weight, None

    def __call__(self, logits, z, index, labels, config):
        if self.table is None:
            self.table = torch.zeros(len(labels.table), logits.shape[1], device=logits.device)
        p = logits.softmax(1).clamp(1e-4, 1 - 1e-4)  # (2B, C)
        seen = mean_of_views(p.detach())
        self.table[index] = self.beta * self.table[index] + (1 - self.beta) * seen / seen.sum(1, keepdim=True)
        agreement = (self.table[index].repeat(2, 1) * p).sum(1)  # (2B,)
        cross_entropy, _ = classify(logits, z, index, labels, config)
        return cross_entropy, self.weight * (1 - agreement).log().mean()


# ==== Two networks: Co-teaching =======================================================================================


def new_student(config, images, classes):
    """A Student on its device, and its optimiser, as in tclip.train()."""
    student = tclip.Student(config.arch, classes, images.pixels.shape[-1])
    student.to(torch.device(config.device), memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    return student, optimizer


def batches(config, optimizer, members, epoch):
    """One pass over `members`, int64 (N,), in random order: batches of them. Sets the learning rate of each step."""
    steps = math.ceil(len(members) / config.batch_size)
    order = torch.randperm(len(members), device=members.device)
    for step, index in enumerate(members[order].tensor_split(steps)):
        for group in optimizer.param_groups:
            group["lr"] = tclip.learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
        yield index


def two_views(config, pixels):
    """uint8 (B, 3, S, S) -> float (2B, 3, S, S): rows i and i + B are random views of image i."""
    return tclip.augment(pixels, views=2, **tclip.VIEWS[config.views])


def forward(student, views):
    """Logits, float32 (2B, C): bfloat16 inside, where that is fast."""
    kind = views.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=tclip.has_fast_bfloat16(views.device)):
        return student(views.contiguous(memory_format=torch.channels_last))[0].float()


def descend(optimizer, loss):
    """One step of the optimiser."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def mean_of_views(values):
    """Mean over the two views of each image: (2B, ...) -> (B, ...)."""
    return values.unflatten(0, (2, -1)).mean(0)


def co_teaching(config, images, probs, forget_epochs=10):
    """Two networks, each of which learns from the images of a batch that are easy for the *other*.

    The share that is forgotten grows in `forget_epochs` to the share of wrong labels. The paper takes that as known;
    here it is estimated as the teacher's mean doubt, 1 - its mean confidence. Han et al. 2018, "Co-teaching: Robust
    Training of Deep Neural Networks with Extremely Noisy Labels", algorithm 1. Returns the first network.
    """
    torch.manual_seed(config.seed)
    (first, optimizer), (second, other) = (new_student(config, images, probs.shape[1]) for _ in range(2))
    optimizer.add_param_group(other.param_groups[0])  # the losses have no network in common: one step does
    device, forget_rate = torch.device(config.device), 1 - probs.amax(1).mean().item()
    pixels, labels = images.pixels.to(device), probs.argmax(1).to(device)
    for epoch in range(config.epochs):
        first.train(), second.train()
        for index in batches(config, optimizer, torch.arange(len(pixels), device=device), epoch):
            views, targets = two_views(config, pixels[index]), labels[index].repeat(2)
            losses = [F.cross_entropy(forward(net, views), targets, reduction="none") for net in (first, second)]
            descend(optimizer, sum(exchange(*map(mean_of_views, losses), forget_rate * min(epoch / forget_epochs, 1))))
    return first


def exchange(first, second, forget):
    """Losses (B,) of two networks on the same images, each averaged over the small-loss images of the other.

    forget: the share of images left out.
    """
    keep = max(1, int((1 - forget) * len(first)))
    easy_for_first, easy_for_second = first.argsort()[:keep], second.argsort()[:keep]
    return first[easy_for_second].mean(), second[easy_for_first].mean()


# ==== The table of methods ============================================================================================


FIXED = dict(label_momentum=1.0, class_prior="none")  # labels stay as they are given


@dataclass(frozen=True)
class Method:
    """A way to learn from a teacher's answers.

    source: where it is published. targets: what is made of the teacher's probabilities. objective: makes the objective
    of a run; None: tclip's. settings: fields of Config. features: the teacher's image features are used as well.
    started: the targets are made of the labels that tclip starts from. rule: functions or classes of tclip.py by their
    names, which are others during the run. two_networks: in place of tclip.train(), a function,
    (config, images, probs) -> network.
    """

    source: str
    targets: Callable = soft
    objective: Callable | None = None
    settings: dict = field(default_factory=dict)
    features: bool = True
    started: bool = False
    rule: dict = field(default_factory=dict)
    two_networks: Callable | None = None

    def run(self, config, images, on_epoch=None):
        """Train on the Images: (student, its labels after the last epoch, (N, C), or None of two networks)."""
        probs = self.targets(starting_labels(config, images) if self.started else images.probs)
        config = replace(config, **self.settings)
        if self.two_networks:
            return self.two_networks(config, images, probs), None
        features, objective = images.features if self.features else None, self.objective and self.objective()
        with exchanged(self.rule):
            student, labels = tclip.train(config, images.pixels, probs, features, None, objective, on_epoch)
            if hasattr(objective, "table"):  # of ELR
                return student, F.normalize(objective.table, p=1, dim=1).cpu()
            return student, labels.final(tclip.predict(student, images.pixels)).cpu()  # by the exchanged rule, too


@contextmanager
def exchanged(rule):
    """Within it, these functions or classes of tclip.py, a dict by name, are in place of its own."""
    own = {name: getattr(tclip, name) for name in rule}
    vars(tclip).update(rule)
    try:
        yield
    finally:
        vars(tclip).update(own)


def starting_labels(config, images):
    """The labels (N, C) that tclip starts from: the teacher's answers, as far as its image features mend them."""
    shares = tclip.class_shares(config.class_prior, range(images.probs.shape[1]))
    rule = config.label_momentum, config.label_neighbours, shares
    return tclip.EnsembleLabels(images.probs, images.features, *rule).targets(slice(None))


def fixed(source, targets, objective):
    """A method whose labels stay as they are given."""
    return Method(source, targets, objective, FIXED, features=False)


METHODS = {
    "cross-entropy": fixed("the plain way", hard, lambda: classify),
    "soft labels": fixed("distillation, Hinton et al. 2015", soft, lambda: classify),
    "balanced labels": fixed("soft labels by Sinkhorn, Asano et al. 2020", balanced, lambda: classify),
    "label smoothing": fixed("Szegedy et al. 2016", smoothed, lambda: classify),
    "GCE": fixed("Zhang and Sabuncu 2018", hard, lambda: partial(classify, loss=gce)),
    "SCE": fixed("Wang et al. 2019", hard, lambda: partial(classify, loss=sce)),
    "ELR": fixed("Liu et al. 2020", hard, ELR),
    "SimCLR + CE": fixed("Chen et al. 2020", hard, lambda: partial(contrast, by_class=False, temperature=0.5)),
    "SupCon + CE": fixed("Khosla et al. 2020", hard, lambda: partial(contrast, by_class=True, temperature=0.1)),
    "Co-teaching": Method("Han et al. 2018", two_networks=co_teaching),
    "tclip": Method("this project, after Huang et al. 2022"),
    "tclip without C3L": Method("its ensemble labels alone", settings=dict(c3l_weight=0.0)),
    "tclip with fixed labels": Method("its C3L alone", settings=dict(label_momentum=1.0)),
    "tclip without CLIP's features": Method("its labels follow the student alone", features=False),
}

# Baselines that get the same start of the labels as tclip: what comes of better labels, and what of better training.
STARTED = {
    f"{name} on tclip's start": replace(METHODS[name], started=True)
    for name in ("cross-entropy", "soft labels", "GCE", "ELR", "SimCLR + CE", "SupCon + CE")
} | {"tclip with fixed labels on its start": Method("C3L", settings=FIXED, features=False, started=True)}

# ==== tclip with one thing changed ====================================================================================


def changed(**settings):
    """An entry of STUDY: tclip with these settings in place of its own."""
    name = " + ".join(f"{field.replace('_', ' ')} {value}" for field, value in settings.items())
    return name, Method("this project", settings=settings)


def without_mass(answers, near, mass, trust, sharpness, rule=tclip.bayes_rule):
    """bayes_rule() with the likelihood n in place of n / pi: large classes take what lies between."""
    return F.normalize(rule(answers, near, mass, trust, sharpness) * mass**sharpness, p=1, dim=1)


def without_prior(answers, near, mass, trust, sharpness, rule=tclip.bayes_rule):
    """bayes_rule() with T0 in place of pi T0 / mean T0: the teacher's answers as they are."""
    q = rule(answers, near, mass, trust, sharpness)
    return F.normalize(q * (answers.mean(0) / mass) ** trust, p=1, dim=1)


def judged(trust=None, sharpness=None, verdict=tclip.verdict):
    """verdict() with one of the exponents fixed."""
    fixed = trust, sharpness

    def exponents(*given, **enough):
        found = verdict(*given, **enough)
        return torch.stack([own if value is None else torch.full_like(own, value) for own, value in zip(found, fixed)])

    return exponents


class OneRound(tclip.EnsembleLabels):
    """Ensemble labels that follow the teacher's features once before training, not in 20 rounds."""

    def __init__(self, probs, features=None, *rule, **trial):
        super().__init__(probs, None, *rule, **trial)
        if features is not None:
            places = tclip.nearest(F.normalize(features.float(), dim=1), self.neighbours)
            self.exponents[0] = 1
            self.update(slice(None), self.targets(slice(None)), places)
            self.exponents[0] = 0
            self.answers.copy_(self.table)


def ruled(**rule):
    """tclip with these functions or classes in place of its own."""
    return Method("this project", rule=rule)


STUDY = {
    "tclip": METHODS["tclip"],
    "without C3L": METHODS["tclip without C3L"],
    "with fixed labels": METHODS["tclip with fixed labels"],
    "without CLIP's features": METHODS["tclip without CLIP's features"],
    "one round before training": ruled(EnsembleLabels=OneRound),
    "hard labels at the start": Method("this project", hard),
    "trust 0": ruled(verdict=judged(trust=0.0)),
    "trust 1": ruled(verdict=judged(trust=1.0)),
    "without the mass": ruled(bayes_rule=without_mass),
    "without the prior": ruled(bayes_rule=without_prior),
    "sharpness 0.5": ruled(verdict=judged(sharpness=0.5)),
    "sharpness 1.5": ruled(verdict=judged(sharpness=1.5)),
    "sharpness 2": ruled(verdict=judged(sharpness=2.0)),
} | dict(
    [
        changed(class_prior="uniform"),
        *(changed(label_neighbours=value) for value in (5, 20, 40)),
        *(changed(label_momentum=value) for value in (0.0, 0.8)),
        *(changed(class_share=value) for value in (0.0, 1.0)),
        *(changed(c3l_weight=value) for value in (0.3, 3.0)),
        *(changed(temperature=value) for value in (0.2, 1.0)),
    ]
)

# Where the teacher has no image features these are left out.
NEED_FEATURES = {*STARTED, "tclip without CLIP's features", "without CLIP's features", "one round before training"}
