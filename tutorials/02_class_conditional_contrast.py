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
# [![Open in Colab][badge]][colab]
#
# Cross-entropy believes its labels. A contrastive loss can do without any: it asks of the student that two views of the
# same image look alike to it, and other images different. The *class-conditional* contrastive loss (C3L) lies between:
# it uses the labels, but only as far as they are sure, and to pull only as long as the student knows no better. In
# training the two losses are added up ([notebook 4](04_training_loop.ipynb)). This notebook takes the second apart,
# with toy points in the plane.
#
# In [tclip.py](../tclip.py) it is one short function: `class_conditional_contrastive_loss`.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/02_class_conditional_contrast.ipynb

# %%
# Installs the package where it is missing, as on Colab. OWNER stands for the account that publishes the repository.
import importlib
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/tclip"
sys.path[:0] = ["..", ".", "tclip", "tclip/tutorials"]  # tclip.py lies one folder up, or in the clone made below
try:
    import tclip
except ImportError:
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./tclip"], check=True)
    importlib.invalidate_caches()  # Python remembers that these folders were not there
    import tclip

# %%
import os
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, GREEN, ORANGE, PINK, RED, SKY, show_source, takeaway

started = time.time()
STEPS = 20 if os.environ.get("TCLIP_QUICK") == "1" else 400  # few, to test that all cells run
torch.manual_seed(0)
DEFAULT = tclip.Config()  # which choice tclip makes when you say nothing
print(f"default: positives={DEFAULT.positives!r}, negatives={DEFAULT.negatives!r}, temperature={DEFAULT.temperature}")


def contrast(z, targets, temperature, positives, negatives):
    """The loss by the names that `python tclip.py --positives ... --negatives ...` knows, or by a share of classes."""
    class_share = {"instance": 0.0, "class": 1.0}.get(positives, positives)
    return tclip.class_conditional_contrastive_loss(z, targets, temperature, class_share, negatives)


# %% [markdown]
# ## What does a contrastive loss want?
#
# Take a batch of $B$ images and two random views of each: $2B$ rows. The student turns a row $i$ into a vector $z_i$ of
# length one. Let $s_{ij} = \langle z_i, z_j\rangle / \tau$ be how similar two rows are, with a temperature $\tau$, and
# let $i^+$ be the other view of the image of row $i$. Then *SimCLR* asks a question with $2B - 1$ possible answers:
# which of the other rows is my other view? Its loss is nothing but cross-entropy:
#
# $$L_i = -\log\frac{\exp s_{ii^+}}{\sum_{k\ne i}\exp s_{ik}}$$
#
# The loss of a batch is the mean of all $L_i$. No label is in it. Let us check that tclip's function says the same, in
# a few lines.

# %%
B = 6
z = F.normalize(torch.randn(2 * B, 16), dim=1)  # row i and row i + B are the two views of an image
any_labels = torch.rand(B, 3).softmax(1)

similar = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)  # a row is no answer to its own question
other_view = torch.arange(2 * B).roll(B)
simclr = F.cross_entropy(similar, other_view)
same_by_tclip = contrast(z, any_labels, temperature=0.5, positives="instance", negatives="all")
takeaway(
    f"SimCLR is cross-entropy over the rows of a batch: {simclr:.4f} by hand, {same_by_tclip:.4f} by tclip with "
    'class_share=0 (by instance), negatives="all", whatever the labels.'
)

# %% [markdown]
# ## How do labels get in?
#
# SimCLR (Chen et al. 2020) pushes every other image away, also one of the same class. *SupCon* (supervised contrast,
# Khosla et al. 2020) uses labels against that: every row of the same class is a positive, and is pulled. If labels are
# wrong, so are its pulls.
#
# Both, and more, are one formula with two sets of weights. $w$ says what is pulled, and $v$ what is pushed; $j$ and $k$
# run over all rows but $i$:
#
# $$L_i = -\sum_j w_{ij} \log\frac{\exp s_{ij}}{\sum_{k} v_{ik}\exp s_{ik}}$$
#
# Both sets depend on one number for each pair, the *class agreement* $a_{ij} = \langle T_i, T_j\rangle$. If $T_i$ and
# $T_j$ are the probabilities of the classes of two images, this is the chance that both are of the same class, if one
# tells nothing about the other. Of the other view of an image it is one, whatever the labels.
#
# | `positives` | `negatives` | $w_{ij}$ | $v_{ik}$ | in words |
# |---|---|---|---|---|
# | instance | all | 1 for $j=i^+$, else 0 | 1 | SimCLR: pull the other view, push all others |
# | class | all | $a_{ij}/\sum_k a_{ik}$ | 1 | SupCon with soft labels: pull classmates, push all others |
# | instance | other | 1 for $j=i^+$, else 0 | $1-a_{ik}$ | pull the other view, push those of other classes |
# | instance | same | 1 for $j=i^+$, else 0 | $a_{ik}$ | ... push classmates: which one of its class is it? |
# | class | other | $a_{ij}/\sum_k a_{ik}$ | $1-a_{ik}$ | pull classmates, push those of other classes |
#
# (The other view has $v_{ii^+} = 1$; and in the term of a positive $j$ its own $v_{ij}$ is 1, so that no ratio can
# exceed one.) The default, `--positives both`, lies between the last of these and instance + other; we come to it when
# we know both.

# %%
CHOICES = [("instance", "all"), ("class", "all"), ("instance", "other"), ("instance", "same"), ("class", "other")]
LINES = dict(zip(CHOICES, zip((BLACK, RED, BLUE, GREEN, PINK), ("-", "--", "-", ":", "-."))))


def title(choice):
    known = {("instance", "all"): " (SimCLR)", ("class", "all"): " (SupCon)"}
    return " + ".join(choice) + known.get(choice, "")


one_class, no_class = torch.ones(B, 1), torch.eye(B)  # everybody agrees; nobody does
for choice in CHOICES:
    same, different = contrast(z, one_class, 0.5, *choice), contrast(z, no_class, 0.5, *choice)
    print(f"{title(choice):28} all of one class: {same.abs():.4f}    all of different classes: {different.abs():.4f}")
alone = contrast(z, one_class, 0.5, "instance", "other")
apart = contrast(z, no_class, 0.5, "instance", "other")
takeaway(
    f"instance + other lies between two ends: where no two images share a class it is SimCLR ({apart:.4f} against "
    f"{simclr:.4f} above), and where all do there is nobody to push and nothing to lose ({alone.abs():.4f})."
)

# %% [markdown]
# ## Who agrees with whom?
#
# So everything hangs on the matrix of agreements, $a_{ij}$. Here it is for some digits, sorted by their true class: as
# it should be, and as CLIP's pseudo-labels of [notebook 1](01_pseudo_labels.ipynb) make it, hard (the best name only),
# as they are, and balanced, which is what training on the digits starts from.

# %%
teacher = tclip.load_clip("offline")
images = tclip.load_images("digits", teacher=teacher)
prompts = tclip.text_classifier(teacher, images.classes, tclip.DATASETS["digits"].templates)
probs = tclip.zero_shot_probs(images.features, prompts)  # (N, C)
truth, C = F.one_hot(images.truth).float(), len(images.classes)
EACH = 8
rows = torch.cat([(images.truth == c).nonzero()[:EACH, 0] for c in range(C)])  # eight of each class

kinds = {
    "the truth": truth,
    "CLIP, hard": F.one_hot(probs.argmax(1), C).float(),
    "CLIP, soft": probs,
    "CLIP, balanced": tclip.balance(probs),
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.4), sharey=True)
for ax, (name, labels) in zip(axes, kinds.items()):
    picture = ax.imshow(labels[rows] @ labels[rows].T, cmap="viridis", vmin=0, vmax=1)
    ax.set(title=name, xlabel="true class of image j")
    ax.set_xticks(torch.arange(C) * EACH + EACH / 2 - 0.5, images.classes, rotation=90)
    ax.set_yticks(torch.arange(C) * EACH + EACH / 2 - 0.5, images.classes)
axes[0].set_ylabel("true class of image i")
figure.colorbar(picture, ax=axes, label="agreement", shrink=0.8)
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
# ## Who pulls whom?
#
# Let us see the forces between single rows. A force is minus the gradient of the loss with respect to a row. It is a
# sum over the other rows, each of which pulls or pushes along its own direction; and as long as these directions are
# independent, the sum can be taken apart by solving a linear system. The vectors are drawn at random here, nearly at
# right angles to each other, so that what you see comes from the weights alone. There are three classes, A, B and C, of
# four images, and the labels are right. (Colours show the root of a force, so that weak ones can be seen as well, and
# each panel has its own scale: compare within a panel, not between two.)

# %%
size, members = 3, 4
targets = torch.eye(size).repeat_interleave(members, 0)  # (12, 3)
z = F.normalize(torch.randn(2 * len(targets), 512), dim=1)
by_image = torch.arange(len(z)).view(2, -1).T.flatten()  # the two views of an image side by side

figure, axes = plt.subplots(1, 5, figsize=(14, 3.4), sharey=True)
for ax, choice in zip(axes, CHOICES):
    moving = z.clone().requires_grad_()
    contrast(moving, targets, 0.5, *choice).backward()
    forces = torch.linalg.lstsq(z.T, -moving.grad.T).solution.T  # forces[i, j]: of row j on row i
    forces = forces[by_image][:, by_image] / forces.abs().max()
    forces = forces.sign() * forces.abs().sqrt()
    picture = ax.imshow(forces, cmap="PuOr", vmin=-1, vmax=1)
    for edge in range(1, size):
        ax.axhline(2 * members * edge - 0.5, color=BLACK, lw=0.6)
        ax.axvline(2 * members * edge - 0.5, color=BLACK, lw=0.6)
    ax.set_xticks(2 * members * torch.arange(size) + members - 0.5, list("ABC"))
    ax.set_yticks(2 * members * torch.arange(size) + members - 0.5, list("ABC"))
    ax.set_title(title(choice), fontsize=9)
    ax.set_xlabel("row that acts, by class")
axes[0].set_ylabel("row that is moved, by class")
bar = figure.colorbar(picture, ax=axes, shrink=0.7, ticks=[-1, 0, 1])
bar.ax.set_yticklabels(["pushes", "nothing", "pulls"])
plt.show()
takeaway(
    "the small squares along the diagonal are the two views of an image, which pull each other in every case. The "
    "choices differ in the boxes of a class (pull, push, or let alone) and outside them (push or let alone)."
)

# %% [markdown]
# ## What does that do to points in the plane?
#
# Now a student with an embedding in the plane. A vector of length one is then a point on a circle, and can only move
# along it. Six images, two views each; three images are of class A (circles) and three of class B (squares), and the
# groups have begun to part. An arrow shows which way a small step of gradient descent would take a point; the longer,
# the farther. In the lower row one image of class A carries the label B: its two views have a red ring. All else is the
# same.

# %%
angles = torch.tensor([20.0, 55.0, 80.0, 120.0, 150.0, 190.0])  # A A A B B B
is_b = torch.tensor([False, False, False, True, True, True])
WRONG = 1  # the image of class A that gets the label B
turn = torch.cat([angles - 5, angles + 5]).deg2rad()  # two views of each


def labels_with(share):
    """Labels (6, 2) on the classes A and B, with `share` of image WRONG's label on the wrong class."""
    targets = F.one_hot(is_b.long(), 2).float()
    targets[WRONG] = torch.tensor([1 - share, share])
    return targets


def force(turn, targets, choice, temperature=0.5):
    """Minus the gradient with respect to the angle of each point: above zero is counter-clockwise."""
    turn = turn.clone().requires_grad_()
    contrast(torch.stack([turn.cos(), turn.sin()], 1), targets, temperature, *choice).backward()
    return -turn.grad


def draw(ax, turn, targets, choice, temperature=0.5, wrong=False, scale=1.0, reach=(-0.9, 1.6)):
    """The points on the circle, the forces on them outside of it, and a red ring around those with the wrong label."""
    ax.add_patch(plt.Circle((0, 0), 1, fill=False, color="lightgray", zorder=0))
    x, y = turn.cos(), turn.sin()
    if scale:
        push = scale * force(turn, targets, choice, temperature) / 0.3
        ax.quiver(
            1.16 * x, 1.16 * y, -push * y, push * x, angles="xy", scale_units="xy", scale=1, width=0.011, color=BLACK
        )
    for group, marker, color in ((~is_b, "o", SKY), (is_b, "s", ORANGE)):
        group = group.repeat(2)
        ax.scatter(x[group], y[group], s=50, marker=marker, color=color, edgecolors="white")
    if wrong:
        rings = [WRONG, WRONG + 6]
        ax.scatter(x[rings], y[rings], s=100, facecolors="none", edgecolors=RED, linewidths=1.8, zorder=3)
    ax.set(xlim=(-1.75, 1.75), ylim=reach, aspect="equal", xticks=[], yticks=[])
    for side in ax.spines.values():
        side.set_visible(False)


figure, axes = plt.subplots(2, 5, figsize=(14, 4.7))
for column, choice in zip(axes.T, CHOICES):
    draw(column[0], turn, labels_with(0), choice)
    draw(column[1], turn, labels_with(1), choice, wrong=True)
    column[0].set_title(title(choice), fontsize=10)
for ax, label in zip(axes[:, 0], ("all labels right", "one label wrong")):
    ax.set_ylabel(label)
plt.show()


def towards_b(share, choice):
    """Force on the two views of image WRONG in the direction of class B, which lies counter-clockwise of it."""
    return force(turn, labels_with(share), choice)[[WRONG, WRONG + 6]].sum().item()


for choice in CHOICES:
    print(f"{title(choice):28} force on the image towards class B: {towards_b(0, choice):+.3f} with the right label, "
          f"{towards_b(1, choice):+.3f} with the wrong one")  # fmt: skip
turned = [title(choice) for choice in CHOICES if towards_b(0, choice) < 0 < towards_b(1, choice)]
takeaway(
    f"the wrong label turns the force round, from away from the wrong class to towards it, with {', '.join(turned)}."
)

# %% [markdown]
# ## Why does a wrong label hurt, and where does it hurt less?
#
# The numbers above, with all in between: let the label of that one image go over from A to B bit by bit. A label on
# which CLIP is undecided lies in the middle. (How much it takes to turn the force depends on where the points lie. The
# order of the choices is what to look at.)

# %%
shares = torch.linspace(0, 1, 21)
figure, ax = plt.subplots(figsize=(7, 3.2))
for choice in CHOICES:
    color, line = LINES[choice]
    ax.plot(shares, [towards_b(s, choice) for s in shares.tolist()], color=color, ls=line, label=title(choice))
ax.axhline(0, color="gray", lw=0.8)
ax.set(xlabel="share of the label on the wrong class", ylabel="force towards\nthe wrong class")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
turns = {}  # the share of the label at which the force begins to point at the wrong class, to a percent
for choice in (("class", "all"), ("class", "other"), ("instance", "other")):
    turns[choice] = next((s / 100 for s in range(101) if towards_b(s / 100, choice) > 0), float("nan"))
    print(f"{title(choice):28} points to the wrong class from a share of {turns[choice]:.0%} on")
takeaway(
    f"with SupCon's choice {turns[('class', 'all')]:.0%} of the label on the wrong class are enough to turn the image "
    f"towards it, with instance + other it takes {turns[('instance', 'other')]:.0%}."
)

# %% [markdown]
# With instance + other a wrong label does harm, too: the image is no longer pushed off by the wrong class, and is
# pushed off by its own. But nothing *pulls* it to where it does not belong. A label in that loss can only decide whom
# to leave alone. What is pulled together rests on something that cannot be wrong: that two views are of the same image.
#
# (With instance + same it is the reverse: labels decide who is pushed, and a wrong one drives the image away from the
# wrong class. That choice leaves the parting of the classes to cross-entropy.)
#
# ## Where do the points end up?
#
# Let the points go on, each by small steps along its force: in the upper row with an undecided label, half and half, in
# the lower one with a label that is entirely wrong. The lines are the ways of the points, from the outside in; red and
# broken for the image with that label. (In a student they are not free: all are the output of one network, to which
# images that look alike are alike, and there is room for more than a circle has. So take it as a cartoon.)


# %%
def settle(targets, choice):
    """The angles of the points at all steps: (steps, 12)."""
    path = [turn]
    for _ in range(STEPS):
        path.append(path[-1] + 0.2 * force(path[-1], targets, choice))
    return torch.stack(path)


def nearness(turn):
    """Mean cosine of the mislabelled image with its own class and with the wrong one."""
    points = torch.stack([turn.cos(), turn.sin()], 1)  # (12, 2)
    cosines = (points @ points[[WRONG, WRONG + 6]].mean(0)).view(2, 6).mean(0)
    return cosines[[0, 2]].mean().item(), cosines[is_b].mean().item()


figure, axes = plt.subplots(2, 5, figsize=(14, 5.4))
for column, choice in zip(axes.T, CHOICES):
    column[0].set_title(title(choice), fontsize=10)
    for ax, share in zip(column, (0.5, 1.0)):
        path = settle(labels_with(share), choice)
        radius = torch.linspace(1.6, 1.08, len(path))
        for i, way in enumerate(path.T):
            color, line = (RED, "--") if i % 6 == WRONG else (ORANGE if is_b[i % 6] else SKY, "-")
            ax.plot(radius * way.cos(), radius * way.sin(), color=color, ls=line, lw=1.2)
        draw(ax, path[-1], labels_with(share), choice, wrong=True, scale=0, reach=(-1.7, 1.7))
for ax, label in zip(axes[:, 0], ("undecided label", "wrong label")):
    ax.set_ylabel(label)
plt.show()

# %%
shares = torch.linspace(0, 1, 11)
figure, ax = plt.subplots(figsize=(7, 3.2))
ends = {}
for choice in CHOICES:
    color, line = LINES[choice]
    ends[choice] = [nearness(settle(labels_with(s), choice)[-1])[1] for s in shares.tolist()]
    ax.plot(shares, ends[choice], color=color, ls=line, label=title(choice))
ax.axhline(0, color="gray", lw=0.8)
ax.set(xlabel="share of the label on the wrong class", ylabel="cosine with the\nwrong class, at the end")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
supcon, mild = ends[("class", "all")], ends[("instance", "other")]
takeaway(
    f"an undecided label ends at a cosine of {supcon[5]:+.2f} with the wrong class under SupCon's choice, and of "
    f"{mild[5]:+.2f} under instance + other. A label that is wrong and sure of it wins in both ({supcon[-1]:+.2f} and "
    f"{mild[-1]:+.2f}): pushed off by its own class, the image has nowhere else to go in this plane."
)

# %% [markdown]
# No choice is safe. Those that read labels act on what labels say, and SimCLR, which reads none, learns nothing from
# the right ones either. Labels that are sure of a wrong class have to be mended, or at least doubted: that is the
# subject of [notebook 3](03_ensemble_labels.ipynb).
#
# ## So which one does tclip take?
#
# Both: pull by class, and by instance, in shares $c$ and $1 - c$ that change as the student learns:
#
# $$w_{ij} = c\,\frac{a_{ij}}{\sum_k a_{ik}} + (1-c)\,[j=i^+], \qquad c = 1 - \text{trust}$$
#
# The *trust* in the student, between 0 and 1, comes from the ensemble labels ([notebook 3](03_ensemble_labels.ipynb)):
# it is high where images that look alike to the student are called alike. At first it is low. The labels are the best
# that there is then, and to pull by them teaches classes. Once it is high, alike images belong together of themselves;
# then it pays to tell images apart, so that a group with a wrong name can part from the class of that name. Here is
# the force on the mislabelled image again, for five values of $c$. (In training the label of the image changes, too.)

# %%
pulled_by = {c: [towards_b(s, (c, "other")) for s in shares.tolist()] for c in (1.0, 0.75, 0.5, 0.25, 0.0)}
figure, ax = plt.subplots(figsize=(7, 3.2))
for (c, forces), color, line in zip(pulled_by.items(), (PINK, ORANGE, GREEN, SKY, BLUE), ("-.", "--", ":", "--", "-")):
    ax.plot(shares, forces, color=color, ls=line, label=f"c = {c:g}")
ax.axhline(0, color="gray", lw=0.8)
ax.set(xlabel="share of the label on the wrong class", ylabel="force towards\nthe wrong class")
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
takeaway(
    f"as the trust grows, the pull of a label that is entirely wrong falls from {pulled_by[1.0][-1]:+.3f} (all by "
    f"class) to {pulled_by[0.0][-1]:+.3f} (all by instance)."
)

# %% [markdown]
# ## What does the temperature do?
#
# A row is pushed by each of the others in proportion to $v_{ik}\exp s_{ik}$, so by those most that are most similar to
# it: the *hard negatives*. The temperature says how unevenly. Left: how the push is shared out among others at equal
# spacing of the cosine. Right: the points of above, with all labels right, at a low and a high temperature. The arrows
# are scaled by the temperature to make them comparable.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 3), width_ratios=[4, 3, 3])
cosine = torch.linspace(-1, 1, 41)
push_share = {t: (cosine / t).softmax(0) for t in (0.1, 0.5, 2.0)}
for (t, share), color, line in zip(push_share.items(), (RED, BLUE, GREEN), ("--", "-", ":")):
    axes[0].plot(cosine, 100 * share, color=color, ls=line, label=f"temperature {t}")
axes[0].set(xlabel="cosine with the row that pushes", ylabel="its share of the push, in %")
axes[0].legend()
for ax, t in zip(axes[1:], (0.1, 2.0)):
    draw(ax, turn, labels_with(0), ("instance", "other"), t, scale=t / 0.5)
    ax.set_title(f"instance + other, temperature {t}")
plt.show()
CLOSE = 0.8
top = {t: share[cosine > CLOSE - 1e-4].sum().item() for t, share in push_share.items()}
takeaway(
    f"the share of the push that comes from others at a cosine of {CLOSE} or more is "
    + ", ".join(f"{share:.0%} at temperature {t}" for t, share in top.items())
    + ". Where the most similar others are classmates, a low temperature makes it matter more that they are left "
    "alone."
)

# %% [markdown]
# ## What do the lines of the function do?
#
# Here is [`class_conditional_contrastive_loss`](../tclip.py) as it runs. Each line has a reason; they follow below.

# %%
show_source(tclip.class_conditional_contrastive_loss)

# %% [markdown]
# * `own.roll(len(z) // 2, 0)`: the diagonal, moved by $B$ rows, marks the pairs of $i$ and $i + B$: the other views.
# * `masked_fill(own, -torch.inf)`: a row is no answer to its own question, so its similarity with itself drops out of
#   every sum.
# * `.clamp(0, 1)`: labels that sum to one only up to rounding could agree by a little more than one, and the logarithm
#   of $1 - a$ would not be a number.
# * `.repeat(2, 2)`: the labels are of images, the rows are views. Both views of an image have its label.
# * `s + v.log()`: a weight inside a sum of exponentials is the addition of its logarithm in front of it. A weight of
#   zero becomes minus infinity, and drops out.
# * `logsumexp`: the same as exp, sum and log one after the other, without overflow at low temperatures.
# * `logaddexp(denominator, s + (1 - v).log())`: raises $v_{ij}$ to one in the term of $j$ itself.
# * `autocast(enabled=False)` and `.float()`: exponentials need the digits that bfloat16 lacks.
# * `(s - denominator).masked_fill(own, 0)`: the diagonal is minus infinity, and zero times infinity is not a number.
# * `by_class` always holds the other view. So no row is ever without a positive, and no division by zero can happen.
# * `torch.lerp(by_instance, by_class, c)` is $(1 - c)$ of the first and $c$ of the second. The rows of both sum to one.
#
# **Take-away: two tables of weights, one masked softmax, and a few lines against infinities.**
#
# ## Exercises
#
# **1.** Give image `WRONG` a label that is half A and half B in the picture of the points. Which arrows change between
# `labels_with(0)`, `labels_with(0.5)` and `labels_with(1)` with instance + same?
#
# <details><summary>Answer</summary>
#
# ```python
# figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
# for ax, share in zip(axes, (0, 0.5, 1)):
#     draw(ax, turn, labels_with(share), ("instance", "same"), wrong=share > 0)
# ```
# Here labels decide who is *pushed*: with the label A the image and its own classmates push each other, with B it and
# the others, and with half and half it and all of them, at half the weight.
# </details>
#
# **2.** Take one image out of its group and place it among the other class (change `angles`), with its right label.
# Which choices bring it back?
#
# <details><summary>Answer</summary>
#
# Try `angles = torch.tensor([20.0, 140.0, 80.0, 120.0, 150.0, 190.0])`, run the cells below it anew, and look at
# `settle(labels_with(0), choice)`. Those that pull classmates bring it back directly. With instance + other it is
# pushed off by the class it lies in, from both sides, and goes where the stronger side pushes it: from 140 degrees
# straight home, from 170 the long way round. But try 160, between the two: it parts the others, and is held among them
# for ever. A loss that never pulls can get stuck. (So it does on a circle; in more dimensions there are more ways out.)
# With SimCLR it has no reason to go home: nobody told it where that is. With instance + same its own classmates push it
# farther off, and the parting of the classes is left to cross-entropy.
# </details>
#
# **3.** Which choice is best for training? Ask the student: `python tclip.py --positives class --negatives all --out
# runs/supcon`, and so on. Use more than one `--seed`.
#
# <details><summary>Answer</summary>
#
# Compare `transductive_accuracy` in each `summary.json`. Compare the spread between seeds with the differences between
# choices before you believe in a winner: a single run proves little.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
