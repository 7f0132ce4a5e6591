# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. What should be pulled together, and what pushed apart, when labels may be wrong?
#
# Cross-entropy believes its labels. A contrastive loss can do without any: it asks of the student that two views of the
# same image look alike to it, and other images different. The *class-conditional* contrastive loss (C3L) lies between:
# it uses labels, but only as far as they are sure. In training the two losses, cross-entropy and this one, are added up
# ([notebook 4](04_training_loop.ipynb)). This notebook takes it apart, with toy points in the plane.
#
# In [tclip.py](../tclip.py) it is one short function: `class_conditional_contrastive_loss`.

# %%
# Finds tclip.py, one folder up. Packages that are missing, as on Colab, come from the package index.
import importlib.util
import os
import subprocess
import sys

if not os.path.exists("../tclip.py"):
    raise SystemExit("Run this notebook in the folder tutorials of a copy of tclip's repository.")
if not importlib.util.find_spec("open_clip"):
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-e", ".."], check=True)
sys.path[:0] = ["..", "."]

# %%
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, show_source, takeaway

import tclip
from tclip import class_conditional_contrastive_loss

started = time.time()
torch.manual_seed(0)
TEMPERATURE, SHARE = tclip.Config.temperature, tclip.Config.class_share
c3l = partial(class_conditional_contrastive_loss, temperature=TEMPERATURE, class_share=SHARE)  # as tclip trains

# %% [markdown]
# ## What does a contrastive loss want?
#
# **In short:** to tell, of all rows of a batch, which one is another view of the same image.
#
# Take a batch of $B$ images and two random views of each: $2B$ rows. The student turns a row $i$ into a vector $z_i$ of
# length one. Let $s_{ij} = \langle z_i, z_j\rangle / \tau$ be how similar two rows are, with a temperature $\tau$, and
# let $i^+$ be the other view of the image of row $i$. Then *SimCLR* asks a question with $2B - 1$ possible answers:
# which of the other rows is my other view? Its loss is nothing but cross-entropy:
#
# $$L_i = -\log\frac{\exp s_{ii^+}}{\sum_{k\ne i}\exp s_{ik}}$$
#
# The loss of a batch is the mean of all $L_i$. No label is in it. In code it is short.


# %%
def simclr(z, targets=None):
    """Unit rows (2B, D) of two views -> a scalar. It reads no labels."""
    similar = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)  # (2B, 2B); a row is no answer to its own question
    other_view = torch.arange(len(z)).roll(len(z) // 2)
    return F.cross_entropy(similar, other_view)


B = 6
z = F.normalize(torch.randn(2 * B, 16), dim=1)  # row i and row i + B are the two views of an image
no_class, one_class = torch.eye(B), torch.ones(B, 1)  # no two images share a class; all do
by_tclip = c3l(z, no_class)
takeaway(
    f"SimCLR is cross-entropy over a batch: {simclr(z):.4f}. tclip's loss, of images all different: {by_tclip:.4f}."
)

# %% [markdown]
# ## How do labels get in?
#
# **In short:** as two tables of weights, which say who is pulled together and who is pushed apart.
#
# SimCLR (Chen et al. 2020) pushes every other image away, also one of the same class. *SupCon* (supervised contrast,
# Khosla et al. 2020) pulls all that are called alike, and pushes all others. If labels are wrong, so are its pulls. How
# much two images are called alike is one number, the *class agreement* $a_{ij} = \langle T_i, T_j\rangle$. If $T_i$ and
# $T_j$ are the probabilities of the classes of two images, this is the chance that both are of the same class, if one
# tells nothing about the other. Of the other view of an image it is one, whatever the labels.
#
# tclip's loss has two tables of weights made of it. $w$ says what is pulled, and $v$ what is pushed; $j$ and $k$ run
# over all rows but $i$:
#
# $$L_i = -\sum_j w_{ij} \log\frac{\exp s_{ij}}{\sum_{k} v_{ik}\exp s_{ik}}$$
#
# | loss | pulls, $w_{ij}$ | pushes, $v_{ik}$ |
# |---|---|---|
# | SimCLR | the other view: 1 for $j=i^+$, else 0 | all: 1 |
# | SupCon, soft labels | classmates: $a_{ij}/\sum_k a_{ik}$ | all: 1 |
# | C3L by instance, `class_share=0` | the other view | other classes: $1-a_{ik}$ |
# | C3L by class, `class_share=1` | classmates | other classes: $1-a_{ik}$ |
# | C3L in tclip, a `class_share` between | a share of each | other classes: $1-a_{ik}$ |
#
# (In C3L the other view has $v_{ii^+} = 1$; and in the term of a positive $j$ its own $v_{ij}$ is 1, so that no ratio
# can exceed one.) The share is a setting, `class_share`, and stays the same from the first epoch to the last.


# %%
def supcon(z, targets):
    """Unit rows (2B, D) of two views, labels (B, C) -> a scalar."""
    similar = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    itself = torch.eye(len(z), dtype=torch.bool)
    pulls = (targets @ targets.T).repeat(2, 2).masked_fill(itself.roll(len(z) // 2, 0), 1).masked_fill(itself, 0)
    pulls = pulls / pulls.sum(1, keepdim=True)  # w
    return -(pulls * similar.log_softmax(1).masked_fill(itself, 0)).sum(1).mean()


CHOICES = {  # each a function (z, targets) -> loss
    "SimCLR": simclr,
    "SupCon": supcon,
    "C3L by instance": partial(c3l, class_share=0),
    "C3L by class": partial(c3l, class_share=1),
    "C3L in tclip": c3l,
}
print(f"tclip's defaults: class_share = {SHARE:g}, temperature = {TEMPERATURE:g}")
ends = {}
for name, loss in CHOICES.items():
    ends[name] = [round(loss(z, T).item(), 4) + 0.0 for T in (one_class, no_class)]
    print(f"{name:16} all of one class: {ends[name][0]:7.4f}    all of different classes: {ends[name][1]:7.4f}")
takeaway(
    f"where no two images share a class all {len(CHOICES)} are the same loss. Where all do, SimCLR and SupCon still "
    "push everybody apart, and C3L at most the other view: by instance nothing is left to lose "
    f"({abs(ends['C3L by instance'][0]):.4f})."
)

# %% [markdown]
# ## Who agrees with whom?
#
# **In short:** the dot product of two labels says it, and CLIP's labels say much that is wrong.
#
# So everything hangs on the matrix of agreements, $a_{ij}$. Here it is for some digits, sorted by their true class: as
# it should be; as CLIP's pseudo-labels of [notebook 1](01_pseudo_labels.ipynb) make it, hard (the best name only) and
# as they are; and of the labels that training starts from ([notebook 3](03_ensemble_labels.ipynb)).

# %%
config = tclip.Config(**tclip.DATASETS["digits"]["settings"], device="cpu", cache="none")
images, _, classes = tclip.read_dataset(config)
truth, C, EACH = F.one_hot(images.truth).float(), len(classes), 8
rows = torch.cat([(images.truth == c).nonzero()[:EACH, 0] for c in range(C)])  # EACH of each class

kinds = {
    "the truth": truth,
    "CLIP, hard": F.one_hot(images.probs.argmax(1), C).float(),
    "CLIP, soft": images.probs,
    "tclip's start": tclip.EnsembleLabels(images.probs, images.features).targets(slice(None)),
}
figure, axes = plt.subplots(2, 2, figsize=(9, 8), sharex=True, sharey=True)
for ax, (name, labels) in zip(axes.flat, kinds.items()):
    picture = ax.imshow(labels[rows] @ labels[rows].T, cmap="viridis", vmin=0, vmax=1)
    ax.set_title(name)
    ax.set_xticks(torch.arange(C) * EACH + EACH / 2 - 0.5, classes, rotation=90)
    ax.set_yticks(torch.arange(C) * EACH + EACH / 2 - 0.5, classes)
figure.supxlabel("true class of image j", size="medium")
figure.supylabel("true class of image i", size="medium")
figure.colorbar(picture, ax=axes, label="agreement", shrink=0.5)
plt.show()

pair = ~torch.eye(len(truth), dtype=torch.bool)
classmates = (truth @ truth.T).bool() & pair
strangers = ~classmates & pair
for name, labels in kinds.items():
    agreement = labels @ labels.T
    print(f"{name:15} mean agreement of classmates {agreement[classmates].mean():.2f}, "
          f"of images of different classes {agreement[strangers].mean():.3f}")  # fmt: skip
hard = kinds["CLIP, hard"] @ kinds["CLIP, hard"].T
pulled_wrongly = strangers[hard.bool() & pair].float().mean()
takeaway(
    f"of all pairs that CLIP's best names call classmates {pulled_wrongly:.0%} are of different classes: this is what "
    "a loss that pulls classmates pulls together by mistake."
)

# %% [markdown]
# ## What does that do to points in the plane?
#
# **In short:** right labels draw classes together; a wrong one can turn the force round.
#
# Now a student with an embedding in the plane. A vector of length one is then a point on a circle, and can only move
# along it. So the circle can be drawn unrolled, as a line of angles, one for each loss. Every image has two views; some
# images are of class A (circles) and some of class B (squares), and the groups have begun to part. An arrow shows which
# way a small step of gradient descent would take an image, the mean of its two views; the longer, the farther. Below,
# one image of class A carries the label B: its two views have a red ring, its arrow is red.

# %% tags=["picture"]
angles = torch.tensor([20.0, 55.0, 80.0, 120.0, 150.0, 190.0])  # A A A B B B
is_b = torch.tensor([False, False, False, True, True, True])
WRONG = 1  # the image of class A that gets the label B
turn = torch.cat([angles - 5, angles + 5]).deg2rad()  # two views of each


def labels_with(share):
    """Labels on the classes A and B, with `share` of image WRONG's label on the wrong class."""
    targets = F.one_hot(is_b.long(), 2).float()  # (images, 2)
    targets[WRONG] = torch.tensor([1 - share, share])
    return targets


def force(targets, loss):
    """Minus the gradient with respect to the angle of each point: above zero is counter-clockwise."""
    moving = turn.clone().requires_grad_()
    z = torch.stack([moving.cos(), moving.sin()], 1)
    loss(z, targets).backward()
    return -moving.grad


def draw(ax, share, losses, scale=100):
    """A line for each loss: all points by their angle, and the forces on the images over them."""
    degrees = turn.rad2deg()
    for line, loss in enumerate(losses.values()):
        ax.axhline(line, color="lightgray", lw=1, zorder=0)
        for group, marker, color in ((~is_b, "o", SKY), (is_b, "s", ORANGE)):
            group = group.repeat(2)
            ax.scatter(degrees[group], [line] * group.sum(), s=90, marker=marker, color=color, edgecolors="white")
        for i, push in enumerate(force(labels_with(share), loss).view(2, -1).mean(0).tolist()):
            color, above = RED if share and i == WRONG else BLACK, line - (0.3, 0.52)[i % 2]
            look = dict(arrowstyle="-|>,head_width=0.3", mutation_scale=14, lw=2.5, color=color, shrinkA=0, shrinkB=0)
            ax.annotate("", (angles[i] + scale * push, above), (angles[i], above), arrowprops=look)
        if share:
            rings = degrees.view(2, -1)[:, WRONG]
            ax.scatter(rings, [line] * 2, s=190, facecolors="none", edgecolors=RED, linewidths=2.5)
    ax.set_yticks(range(len(losses)), losses)
    ax.set(xlim=(-10, 220), ylim=(len(losses) - 0.5, -0.8))
    ax.spines["left"].set_visible(False)
    ax.tick_params("y", length=0)


figure, axes = plt.subplots(2, 1, figsize=(9, 8.5), sharex=True)
draw(axes[0], 0, CHOICES)
draw(axes[1], 1, CHOICES)
axes[0].set_title("all labels right")
axes[1].set(title="one label wrong", xlabel="angle on the circle, in degrees")
plt.show()


def towards_b(share, loss):
    """Force on the two views of image WRONG in the direction of class B, which lies counter-clockwise of it."""
    return force(labels_with(share), loss).view(2, -1)[:, WRONG].sum().item()


for name, loss in CHOICES.items():
    print(f"{name:16} force on the image towards class B: {towards_b(0, loss):+.3f} with the right label, "
          f"{towards_b(1, loss):+.3f} with the wrong one")  # fmt: skip
turned = [name for name, loss in CHOICES.items() if towards_b(0, loss) < 0 < towards_b(1, loss)]
takeaway(f"the wrong label turns the force round, towards the wrong class, with: {'; '.join(turned)}.")

# %% [markdown]
# ## Where does a wrong label hurt less?
#
# **In short:** the smaller the share of the pull that goes by class, the less a wrong label pulls.
#
# The numbers above, with all in between: let the label of that one image go over from A to B bit by bit. A label on
# which CLIP is undecided lies in the middle. Left, the losses of above; right, C3L with shares $c$ of class and $1 - c$
# of instance:
#
# $$w_{ij} = c\,\frac{a_{ij}}{\sum_k a_{ik}} + (1-c)\,[j=i^+]$$
#
# (How much it takes to turn a force depends on where the points lie. Look at the order of the lines at the right end.)

# %%
shares = [s / 20 for s in range(21)]
mixes = {f"c = {c:g}": partial(c3l, class_share=c) for c in (1, (1 + SHARE) / 2, SHARE, SHARE / 2, 0)}
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True, width_ratios=[5, 4])
looks = dict(zip(CHOICES, zip((BLACK, RED, GREEN, BLUE, PINK), ("-", "--", "-", "-.", ":"))))
between = (SKY, "-"), (SKY, "--")
looks |= zip(mixes, (looks["C3L by class"], between[0], looks["C3L in tclip"], between[1], looks["C3L by instance"]))
for ax, losses in zip(axes, (CHOICES, mixes)):  # equal losses look alike
    for name, loss in losses.items():
        color, line = looks[name]
        forces = [towards_b(s, loss) for s in shares]
        ax.plot(shares, forces, color=color, ls=line)
        ax.annotate(name, (1.03, forces[-1]), color=color, va="center", annotation_clip=False)
    ax.axhline(0, color="gray", lw=0.8)
axes[0].set_ylabel("force towards the wrong class")
figure.supxlabel("share of the label on the wrong class", size="medium")
plt.show()
turns = {}  # the share of the label at which the force begins to point at the wrong class, to a percent
for name, loss in CHOICES.items():
    turns[name] = next((f"{s}%" for s in range(101) if towards_b(s / 100, loss) > 0), "none")
print("share of the label from which the force points to the wrong class:", turns)
pull = {name: towards_b(1, loss) for name, loss in CHOICES.items()}
takeaway(
    f"the force turns to the wrong class once {turns['SupCon']} of the label are wrong with SupCon, and "
    f"{turns['C3L in tclip']} with tclip's loss. A label that is entirely wrong drives the image there with "
    f"{pull['SupCon']:.2f} in SupCon, and in C3L with {pull['C3L by class']:.2f} by class, "
    f"{pull['C3L by instance']:.2f} by instance and {pull['C3L in tclip']:.2f} with tclip's share of {SHARE:g}."
)

# %% [markdown]
# With C3L by instance a wrong label does harm, too: the image is no longer pushed off by the wrong class, and is pushed
# off by its own. But nothing *pulls* it to where it does not belong. SimCLR, which reads no label, learns nothing from
# the right ones either. So tclip takes a share of both: to pull by class teaches classes, and to pull by instance tells
# images apart whatever they are called. What a whole group with a wrong name does is not in this picture; what the
# share is worth on students is in the [results](benchmark/results/README.md), "class share". No choice is safe from
# labels that are sure of a wrong class: these have to be mended, the subject of [notebook 3](03_ensemble_labels.ipynb).
#
# ## What do the lines of the function do?
#
# **In short:** two tables of weights, one masked softmax, and a few lines against infinities.
#
# Here it is as it runs, and after it what a step of training minimises. Each line has a reason.

# %%
show_source(class_conditional_contrastive_loss, tclip.tclip_objective)

# %% [markdown]
# * `itself.roll(len(z) // 2, 0)`: the diagonal, moved by $B$ rows, marks the pairs of $i$ and $i + B$: the other views.
# * `masked_fill(itself, -torch.inf)`: a row is no answer to its own question: it drops out of every sum.
# * `.clamp(0, 1)`: labels that sum to one only up to rounding could agree by a little more than one, and the logarithm
#   of $1 - a$ would not be a number.
# * `.repeat(2, 2)`: the labels are of images, the rows are views. Both views of an image have its label.
# * `by_class` always holds the other view: no row is without a positive, and no division by zero can happen.
# * `s + v.log()`: a weight inside a sum of exponentials is the addition of its logarithm in front of it. A weight of
#   zero becomes minus infinity, and drops out. `logsumexp` is exp, sum and log without overflow.
# * `logaddexp(denominator, s + (1 - v).log())`: raises $v_{ij}$ to one in the term of $j$ itself.
# * `autocast(enabled=False)` and `.float()`: exponentials need the digits that bfloat16 lacks.
# * `(s - denominator).masked_fill(itself, 0)`: the diagonal is minus infinity, and zero times infinity is no number.
#
# ## Exercises
#
# **1.** What does the temperature do? Draw the points with a low one and a high one.
#
# <details><summary>Answer</summary>
#
# ```python
# draw(plt.gca(), 0, {f"temperature {t}": partial(c3l, temperature=t) for t in (0.1, TEMPERATURE, 2)})
# ```
# A row is pushed by each of the others in proportion to $v_{ik}\exp s_{ik}$, so by those most that are most similar to
# it, the *hard negatives*. At a low temperature hardly anybody else counts; at a high one all push nearly alike.
# (Forces also grow as the temperature falls: a smaller `scale` shortens the arrows.)
# </details>
#
# **2.** Place one image of class A among the others (change `angles`), with its right label. Which choices bring it
# back?
#
# <details><summary>Answer</summary>
#
# Try `angles = torch.tensor([20.0, 140.0, 80.0, 120.0, 150.0, 190.0])`. Those that pull classmates bring it back
# directly. C3L by instance pushes it off from both sides of the class it lies in, and it goes where the stronger side
# sends it. With SimCLR it has no reason to go home: nobody told it where that is.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
