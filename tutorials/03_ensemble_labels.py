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
# # 3. Can labels be mended while a network learns from them?
#
# [![Open in Colab][badge]][colab]
#
# [Notebook 1](01_pseudo_labels.ipynb) ended with labels of which many are wrong, and wrong together. But images that
# are alike mostly share a class, and the teacher's names did not use that. Here you see how Bayes' rule puts the two
# together, first with CLIP's own image features, before anything is trained, then with the features of the student, as
# it learns. These are tclip's *ensemble labels*.
#
# In [tclip.py](../tclip.py) this is the section *Ensemble labels*.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/03_ensemble_labels.ipynb

# %%
# Finds tclip.py, one folder up. Elsewhere, as on Colab, it is fetched; OWNER is the account that publishes it.
import os
import subprocess
import sys

if not os.path.exists("../tclip.py"):
    if not os.path.exists("tclip"):
        subprocess.run(["git", "clone", "--depth", "1", "https://github.com/OWNER/tclip"], check=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./tclip"], check=True)
    os.chdir("tclip/tutorials")
sys.path[:0] = ["..", "."]

# %%
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from plots import BLACK, BLUE, GREEN, RED, SKY, real_clip, show_images, show_source, takeaway

import tclip

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # few images and epochs, to test that all cells run
EPOCHS = 2 if QUICK else 20
torch.manual_seed(0)
title, real = real_clip()  # of aerial images, WHU-RS19; where their file is missing, of the digits
T0, truth, N, C = real.probs, real.truth, *real.probs.shape


def right(labels, truth=truth):
    """Share of labels (N, C) whose first name is right. The truth is for us to look at; the method never reads it."""
    return tclip.score(labels, truth)["accuracy"]


print(f"{title}: {N} images, {C} classes, {right(T0):.1%} of the names right")

# %% [markdown]
# ## What does an image's neighbourhood know?
#
# Look for the $k$ images that are nearest to image $i$ in CLIP's embedding, and count what they are called: $n_{ic}$ is
# the sum of their labels $V_{jc}$, soft ones count by shares. Now there are two witnesses. The teacher looked at the
# image, and says $T^0_{ic}$. The neighbourhood did not, but knows what such images are called. Bayes' rule puts them
# together:
#
# $$\underbrace{q_{ic}}_{\text{posterior}} \;\propto\; \underbrace{T^0_{ic}}_{\text{prior}} \;\cdot\;
# \underbrace{\frac{n_{ic} + \varepsilon}{\text{mass}_c}}_{\text{likelihood}}, \qquad \text{mass}_c = \sum_j V_{jc}$$
#
# The *prior* is what we believe before we look around. The *likelihood* is the chance of an image like this, if the
# class is $c$: of all that is called $c$ (the *mass* of the class), how much lies here? That is the density of the
# class at this place, up to a factor that all classes share. (A small $\varepsilon$ says that none is impossible.)

# %%
K, EPSILON = 10, 0.1
near = (real.features @ real.features.T).fill_diagonal_(-2).topk(K).indices  # (N, K), without the image itself


def likelihood(labels):
    """Of all that is called c, which share lies around image i? (N, C)"""
    return (labels[near].sum(1) + EPSILON) / labels.sum(0)


def posterior(labels):
    q = T0 * likelihood(labels)
    return q / q.sum(1, keepdim=True)


q, around = posterior(T0), T0[near].mean(1)  # (N, C)
steps = {
    "zero-shot says: prior": T0,
    "the neighbours are called": around,
    "divided by the mass: likelihood": likelihood(T0) / likelihood(T0).sum(1, keepdim=True),
    "what comes out: posterior": q,
}
for name, table in steps.items():
    print(f"{name:34}{right(table):.1%} right")
mended = (T0.argmax(1) != truth) & (q.argmax(1) == truth)
example = (q.gather(1, truth[:, None])[:, 0] * mended).argmax().item()  # the one that the rule is surest of
figure, axes = plt.subplots(1, 4, figsize=(12, 4.2), sharey=True)
for ax, (name, table) in zip(axes, steps.items()):
    ax.barh(real.classes, table[example], color=[BLUE if c == truth[example] else SKY for c in range(C)])
    ax.set(title=name, xlabel="share", xlim=(0, 1))
axes[0].invert_yaxis()
figure.suptitle(f"{title}: an image of {real.classes[truth[example]]} (dark)")
plt.show()
takeaway(
    f"zero-shot calls it {real.classes[T0[example].argmax()]}, the posterior {real.classes[q[example].argmax()]}. One "
    f"look around turns {right(T0):.1%} right labels into {right(q):.1%}; {mended.sum()} are mended, and "
    f"{((T0.argmax(1) == truth) & (q.argmax(1) != truth)).sum()} spoiled."
)

# %% [markdown]
# ## Why is the mass divided out?
#
# The labels that come out are better, so ask the neighbours again: put $q$ in the place of $V$, and go on for some
# rounds. Here it is with and without the division. Without it, a neighbourhood says "parking" often merely because
# "parking" is said often, and what is said often is said more often in the next round.

# %%
ROUNDS = 10
runs = {"with the mass": [T0], "without": [T0]}
for _ in range(ROUNDS):
    runs["with the mass"].append(posterior(runs["with the mass"][-1]))
    q = T0 * (runs["without"][-1][near].sum(1) + EPSILON)
    runs["without"].append(q / q.sum(1, keepdim=True))

there = truth.bincount(minlength=C)
order = T0.sum(0).argsort(descending=True)  # the class whose name zero-shot says most comes first
figure, (a, b) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=[2, 3])
for (name, tables), color, line, shift in zip(runs.items(), (BLUE, RED), ("-", "--"), (0, 0.27)):
    a.plot([100 * right(table) for table in tables], color=color, ls=line, label=name)
    b.bar(torch.arange(C) + shift, tables[-1].sum(0)[order], 0.27, color=color, hatch="//" if shift else "")
b.bar(torch.arange(C) - 0.27, T0.sum(0)[order], 0.27, color=SKY)
b.plot(torch.arange(C), there[order], "_", color=BLACK, ms=12, mew=2)
a.set(xlabel="round", ylabel="labels that are right, in %")
a.legend()
b.set_xticks(range(C), [real.classes[c] for c in order], rotation=60, ha="right")
b.set(ylabel="images of that name", title="light: zero-shot; then with and without; black: in truth")
plt.show()
smallest = {name: (tables[-1].sum(0) / there).min() for name, tables in runs.items()}
ends = {name: right(tables[-1]) for name, tables in runs.items()}
takeaway(
    f"after {ROUNDS} rounds {ends['with the mass']:.1%} are right with the mass divided out, {ends['without']:.1%} "
    f"without. The name that is used too seldom has {smallest['with the mass']:.0%} of the images that it should have, "
    f"or {smallest['without']:.0%}."
)

# %% [markdown]
# ## And if the embedding knows nothing?
#
# A rule that always listens to neighbours does harm where they are strangers. Let us shuffle the features, so that
# neighbours are random images. What is $n_{ic}$ then? About $k$ times the share of the class, the same for all images.
# Divided by the mass it is the same for all classes, and a likelihood that is the same for all classes says nothing:
# the labels stay the teacher's. No truth, and no guess of how good the embedding is, was needed for that.

# %%
strangers = torch.randint(N, (N, 200))  # many, so that chance has little room
flat = T0[strangers].sum(1) / T0.sum(0)  # (N, C)
kept = ((T0 * flat).argmax(1) == T0.argmax(1)).float().mean()
vote = (T0[strangers].sum(1).argmax(1) == T0.argmax(1)).float().mean()
takeaway(
    f"with strangers for neighbours, Bayes' rule keeps {kept:.1%} of the teacher's names, where their vote would keep "
    f"{vote:.1%}."
)

# %% [markdown]
# ## How does tclip do it?
#
# As above, with a few more lines. `EnsembleLabels` takes the step before training, in the teacher's features where it
# has any, and after each epoch in the student's embedding.

# %%
show_source(tclip.EnsembleLabels)
at_start = tclip.EnsembleLabels(real.probs, real.features).table.float()
takeaway(f"{title}: zero-shot {right(T0):.1%} right, tclip's labels before training {right(at_start):.1%}.")

# %% [markdown]
# ## Does a network learn wrong labels?
#
# Now to the student, on the digits. `train` calls `on_epoch` after each epoch with the row of its log, the student and
# the labels; that is all we need to watch. We train twice from the same start. In the first run the labels stay as they
# are: a momentum of one keeps all of an old label. In the second they follow. "Wrongly labelled" are the images whose
# *first* label is wrong. After each epoch the student is asked about the images, without augmentation.

# %%
config = tclip.Config(**tclip.DATASETS["digits"]["settings"], epochs=EPOCHS, device="cpu", cache="none")
images, _, classes = tclip.read_dataset(config)
images = tclip.Images(**{name: part[: 300 if QUICK else None] for name, part in vars(images).items()})
rule = config.label_momentum, config.label_neighbours, config.class_prior
start = tclip.EnsembleLabels(images.probs, images.features, *rule).table.float()  # (N, C)
first, truth = start.argmax(1), images.truth  # (N,)
wrong = first != truth
said, tables = {}, {}
for name, momentum in (("frozen labels", 1.0), ("ensemble labels", config.label_momentum)):
    said[name], tables[name] = [], [start]

    def watch(row, student, labels, name=name):
        said[name].append(tclip.predict(student, images.pixels).argmax(1))  # (N,)
        tables[name].append(labels.table.float())  # (N, C)

    settings = replace(config, label_momentum=momentum)
    tclip.train(settings, images.pixels, images.probs, images.features, on_epoch=watch)
    said[name], tables[name] = torch.stack(said[name]), torch.stack(tables[name])  # (E, N), (E + 1, N, C)
print(f"wrongly labelled at the start: {wrong.sum()} of {len(truth)} images")

# %% tags=["picture"]
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
epochs = range(1, EPOCHS + 1)
for ax, (name, answers) in zip(axes, said.items()):
    lines = {
        "rightly labelled: says the truth": ((answers == truth)[:, ~wrong], SKY, "-"),
        "wrongly labelled: says the truth": ((answers == truth)[:, wrong], BLUE, "-"),
        "wrongly labelled: says the wrong label": ((answers == first)[:, wrong], RED, "--"),
    }
    for label, (yes, color, line) in lines.items():
        ax.plot(epochs, 100 * yes.float().mean(1), color=color, ls=line, label=label)
    ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    ax.set(xlabel="epoch", title=name, ylim=(0, 102))
axes[0].set_ylabel("images, in %")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
plt.show()
knows = {name: (answers == truth)[:, wrong].float().mean(1) for name, answers in said.items()}  # (E,)
copied = (said["frozen labels"][-1] == first)[wrong].float().mean()
takeaway(
    f"with frozen labels the student is right about {knows['frozen labels'].max():.0%} of the wrongly labelled images "
    f"in epoch {knows['frozen labels'].argmax() + 1}, and about {knows['frozen labels'][-1]:.0%} in the end, when it "
    f"repeats the wrong label for {copied:.0%}. With ensemble labels it ends at {knows['ensemble labels'][-1]:.0%}."
)

# %% [markdown]
# ## Why does it know better before it knows worse?
#
# What many images agree on is learned first: it takes few steps, each of which serves all of them. Exceptions are
# learned later, one by one, when nothing else is left that would lower the loss. This is called *memorisation* (Arpit
# et al. 2017), and here it can be seen where the red line rises while the dark blue one falls. So there is a time at
# which the student knows better than its labels. Move the labels then, and the exceptions are no longer there to be
# memorised:
#
# $$T \leftarrow m\,T + (1 - m)\,q$$
#
# once per epoch, where $q$ is the posterior of above, with neighbours in the student's embedding, and with what it said
# of them in place of $V$. It said so during the epoch, about the augmented views that it was trained on (`record`): no
# image has to be looked at again. The *momentum* $m$ is the memory: after $n$ updates the share $m^n$ of the old table
# is left.
#
# ## Which labels changed, and were they right?
#
# Four things can happen to a label. It was right and stays right; it was wrong and becomes right (*mended*); it was
# right and becomes wrong (*spoiled*); or it was wrong and stays wrong, the same or another. Only the truth, which the
# method does not have, can tell these apart.

# %%
now_right = tables["ensemble labels"].argmax(2) == truth  # (E + 1, N)
groups = {
    "right all along": (~wrong & now_right, SKY, "-"),
    "mended": (wrong & now_right, GREEN, "-"),
    "spoiled": (~wrong & ~now_right, RED, "--"),
    "still wrong": (wrong & ~now_right, BLACK, ":"),
}
figure, (a, b) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=[3, 4])
bottom = torch.zeros(len(classes))
for name, (members, color, line) in groups.items():
    if name != "right all along":
        a.plot(members.sum(1), color=color, ls=line)
    count = truth[members[-1]].bincount(minlength=len(classes))
    b.bar(classes, count, bottom=bottom, color=color, label=name)
    bottom += count
a.set(xlabel="epoch", ylabel="images")
b.tick_params("x", rotation=60)
b.set_ylabel("images of the class, at the end")
b.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
some = groups["mended"][0][-1].nonzero()[:, 0][:12]
if len(some):
    show_images(images.pixels[some], [f"not {classes[c]}" for c in first[some]], columns=12, side=0.75)
    plt.show()
count = {name: members[-1].sum().item() for name, (members, *_) in groups.items()}
takeaway(
    f"{count['mended']} labels are mended and {count['spoiled']} spoiled; {count['still wrong']} of the {wrong.sum()} "
    f"that were wrong are wrong still. {right(start, truth):.1%} were right at the start of training, and "
    f"{right(tables['ensemble labels'][-1], truth):.1%} are now."
)

# %% [markdown]
# ## Exercises
#
# **1.** What happens to the table with `label_momentum=1`, and what with `0`?
#
# <details><summary>Answer</summary>
#
# With 1 nothing: the labels are frozen, as in the first run. With 0 nothing is remembered: each label is the latest
# posterior, and one bad epoch is felt at once.
# </details>
#
# **2.** Let a class count twice: split one column of `T0` into two halves. What does the rule of above do to the two,
# and what would a vote do?
#
# <details><summary>Answer</summary>
#
# ```python
# T0 = torch.cat([T0, T0[:, :1] / 2], 1)
# T0[:, 0] /= 2
# ```
# Each half has half the prior, half the neighbours and half the mass. The likelihood of both is what that of the whole
# was (but for $\varepsilon$), and so together they get what the class got. In a vote each half has half the votes, and
# loses against others.
# </details>
#
# **3.** Without truth you cannot draw the blue and the red line. What could you watch instead, to see whether labels go
# astray?
#
# <details><summary>Answer</summary>
#
# `metrics.csv` has `labels_changed` for each epoch, the share of images no longer called as the teacher does: it should
# level off. The sizes of the classes, `labels.table.mean(0)`, should stay near what you know of them. And look at
# images whose label changed, twenty of them: `labels.csv` has a column for that.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
