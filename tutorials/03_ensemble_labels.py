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
# [Notebook 1](01_pseudo_labels.ipynb) ended with labels of which many are wrong, and wrong together. A network that is
# trained on them learns the right ones and the wrong ones. Here you see both happen, and what *ensemble labels* do
# about it: labels that move, epoch by epoch, towards what the student itself has come to believe, as far as it can be
# trusted.
#
# In [tclip.py](../tclip.py) this is the section *Ensemble labels*: `EnsembleLabels`, with `neighbour_mean` and
# `balance`.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/03_ensemble_labels.ipynb

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
from plots import BLACK, BLUE, GREEN, ORANGE, RED, SKY, show_images, show_source, takeaway

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # a few epochs on a part of the images, to test that all cells run
EPOCHS = 3 if QUICK else 24

teacher = tclip.load_clip("offline")
images = tclip.load_images("digits", teacher=teacher)
if QUICK:
    images = tclip.Images(
        images.pixels[:300], images.names[:300], images.classes, images.truth[:300], images.features[:300]
    )
prompts = tclip.text_classifier(teacher, images.classes, tclip.DATASETS["digits"].templates)
probs = tclip.zero_shot_probs(images.features, prompts)  # (N, C), the pseudo-labels of notebook 1
N, truth = len(probs), images.truth  # truth is for us to look at; train() never reads it

# %% [markdown]
# ## Does a network learn wrong labels?
#
# `train` calls `on_epoch` after each epoch with the row of its log, the student and the labels. That is all we need to
# watch. We train twice from the same start. In the first run the labels stay as they are: a momentum of one keeps all
# of an old label. In the second they are ensemble labels with the settings of tclip. (A third run, with a longer
# memory, is for later; it runs here so that you wait once.)
#
# "Wrongly labelled" are from here on the images whose *first* label, CLIP's answer after balancing, is wrong. After
# each epoch the student is asked about the images, without augmentation, and its answers go into a list.

# %%
settings = dict(epochs=EPOCHS, device="cpu")
runs = {
    "frozen labels": dict(label_momentum=1.0),
    "ensemble labels": dict(),
    "patient labels": dict(label_momentum=0.9),
}
said, tables, embeddings, trained, trust = {}, {}, {}, {}, {}
for name, changes in runs.items():
    config = tclip.complete(tclip.Config(**settings, **changes))
    trained[name] = config
    trust[name] = []
    said[name], tables[name] = [], [tclip.EnsembleLabels(probs, balanced=config.class_prior == "uniform").table.float()]

    def watch(row, student, labels, name=name):
        said[name].append(tclip.predict(student, images.pixels))  # (N, C)
        tables[name].append(labels.table.float())  # (N, C)
        trust[name].append(row["trust"])

    student, _ = tclip.train(config, images, probs, on_epoch=watch)
    with torch.inference_mode():
        embeddings[name] = student.eval()(images.pixels.float() / 255)[1]  # (N, D), unit rows
    tables[name], said[name] = torch.stack(tables[name]), torch.stack(said[name])  # (E + 1, N, C), (E, N, C)
    print(f"{name}: momentum {config.label_momentum}, {config.epochs} epochs of batches of {config.batch_size}")

first = tables["ensemble labels"][0].argmax(1)  # (N,) the labels that every run starts from
wrong = first != truth
print(f"wrongly labelled at the start: {wrong.sum()} of {N} images")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True)
epochs = range(1, EPOCHS + 1)
for ax, name in zip(axes, ("frozen labels", "ensemble labels")):
    answers = said[name].argmax(2)  # (E, N)
    ax.plot(
        epochs, 100 * (answers == truth)[:, ~wrong].float().mean(1), color=SKY, label="rightly labelled: says the truth"
    )
    ax.plot(
        epochs, 100 * (answers == truth)[:, wrong].float().mean(1), color=BLUE, label="wrongly labelled: says the truth"
    )
    ax.plot(epochs, 100 * (answers == first)[:, wrong].float().mean(1), color=RED, ls="--",
            label="wrongly labelled: says the wrong label")  # fmt: skip
    ax.set(xlabel="epoch", title=name, ylim=(0, 102))
axes[0].set_ylabel("images, in %")
figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
plt.show()


def rightness(answers, which):
    return (answers.argmax(-1) == truth)[which].float().mean().item()


frozen = (said["frozen labels"].argmax(2) == truth)[:, wrong].float().mean(1)  # (E,)
copied = (said["frozen labels"][-1].argmax(1) == first)[wrong].float().mean()
takeaway(
    f"with frozen labels the student is right about {frozen.max():.0%} of the wrongly labelled images in epoch "
    f"{frozen.argmax() + 1}, and about {frozen[-1]:.0%} in the end, when it repeats the wrong label for {copied:.0%}. "
    f"With ensemble labels it ends at {rightness(said['ensemble labels'][-1], wrong):.0%}."
)

# %% [markdown]
# ## Why does it know better before it knows worse?
#
# What many images agree on is learned first: it takes few steps, each of which serves all of them. Exceptions are
# learned later, one by one, when nothing else is left that would lower the loss. This is called *memorisation* (Arpit
# et al. 2017), and here it can be seen as the red line rising while the dark blue one falls. (Notebook 1 found that
# many of CLIP's errors follow a rule, and what follows a rule is learned early as well: even in its best epoch the
# student is far from right about all of the wrongly labelled images.)
#
# So there is a time at which the student knows better than its labels. If the labels are moved towards what it says
# then, the exceptions are no longer there to be memorised. That is the idea:
#
# $$T \leftarrow m\,T + (1 - m)\,\big((1 - w)\,T_0 + w\,q\big)$$
#
# once per epoch, in [`EnsembleLabels.end_epoch`](../tclip.py). $T$ is the table of labels, a row for each image. $T_0$
# is the table that it started as, and $q$ is what the student says. It said so during the epoch, about the augmented
# views that it was trained on, and each time it was recorded (`record`): no image has to be looked at again.
#
# **Take-away: there is a time at which the student knows better than its labels. Move them then.**
#
# ## How fast should labels follow, and how far?
#
# Two numbers decide. $m$, the *momentum*, is the memory: after $n$ updates the share $m^n$ of the old table is left.
# $w$, the *trust*, is how much the student's word counts against the teacher's. In the first epochs the student has
# learned too little to be listened to. One can simply wait for some epochs, a *warm-up*, but how many? tclip measures
# instead: how often do two of an image's neighbours, asked at random, name the same class, and how much more often is
# that than with two strangers? If $p_{ic}$ is the share of class $c$ in what the neighbours of image $i$ say, then
#
# $$a = \frac{b - b_0}{1 - b_0}, \qquad b = \frac 1 N \sum_i \sum_c p_{ic}^2, \qquad
# b_0 = \sum_c \Big(\frac 1 N \sum_i p_{ic}\Big)^2$$
#
# $b$ is the chance that two of the neighbours agree, $b_0$ the chance that two strangers do. (Scott's pi, which is $a$,
# measures in this way how well two raters agree.) The trust is that, sharpened:
#
# $$w = \frac{a^s}{a^s + (1 - a)^s}, \qquad s = 2$$
#
# Where neighbours mostly agree, the student has found what the images have in common, and the teacher's share would
# only hold back labels that are wrong: $w$ is near one. Where they mostly differ, $w$ is near zero and the labels stay
# the teacher's. No truth is needed for it. What it cannot see is neighbours that agree on a wrong name.
#
# Left, the trust; right, how right the labels are. The third run has a higher momentum than the second.

# %%
figure, (a, b) = plt.subplots(1, 2, figsize=(9.5, 3.2))
for name, color, line in zip(runs, (BLACK, BLUE, ORANGE), (":", "-", "--")):
    if trained[name].label_momentum < 1:  # otherwise it is not asked for
        a.plot(epochs, trust[name], color=color, ls=line)
    b.plot([100 * rightness(t, slice(None)) for t in tables[name]], color=color, ls=line, label=name)
a.set(xlabel="epoch", ylabel="trust in the student", ylim=(0, 1.02))
b.set(xlabel="epoch", ylabel="labels that are right, in %")
figure.legend(*b.get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()
ends = {name: rightness(tables[name][-1], slice(None)) for name in runs}
begin = rightness(tables["ensemble labels"][0], slice(None))
takeaway(
    f"of the labels {begin:.1%} are right at first, and in the end {ends['ensemble labels']:.1%} with a momentum of "
    f"{trained['ensemble labels'].label_momentum} and {ends['patient labels']:.1%} with "
    f"{trained['patient labels'].label_momentum}. (One data set, one seed.)"
)

# %% [markdown]
# Both ways have their risk. Labels that follow late are memorised before they move. Labels that follow early follow a
# student that has learned next to nothing. How right is it in the first epochs, and how much is it trusted then?

# %%
early = min(6, EPOCHS)
by_epoch = [rightness(answers, slice(None)) for answers in said["ensemble labels"][:early]]
print("epoch               ", *(f"{e:5d}" for e in range(1, early + 1)))
print("student right       ", *(f"{share:5.0%}" for share in by_epoch))
print("trust in it         ", *(f"{w:5.2f}" for w in trust["ensemble labels"][:early]))
print("its labels right    ", *(f"{rightness(t, slice(None)):5.0%}" for t in tables["ensemble labels"][1 : early + 1]))
lowest = min(rightness(labels, slice(None)) for labels in tables["ensemble labels"])
takeaway(
    f"after one epoch the student is right about {by_epoch[0]:.0%} of the images and its labels about {begin:.0%}, but "
    f"the trust in it is {trust['ensemble labels'][0]:.2f}; the labels are {lowest:.1%} right when they are "
    f"worst, and the trust ends at {trust['ensemble labels'][-1]:.2f}."
)

# %% [markdown]
# ## Which labels changed, and were they right?
#
# Four things can happen to a label. It was right and stays right; it was wrong and becomes right (*mended*); it was
# right and becomes wrong (*spoiled*); or it was wrong and stays wrong, the same or another. Only the truth, which the
# method does not have, can tell these apart.

# %%
table = tables["ensemble labels"]
now_right = table.argmax(2) == truth  # (E + 1, N)
groups = {
    "right all along": (~wrong & now_right, SKY),
    "mended": (wrong & now_right, GREEN),
    "spoiled": (~wrong & ~now_right, RED),
    "still wrong": (wrong & ~now_right, BLACK),
}
figure, (a, b) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=[3, 4])
for name, (members, color) in list(groups.items())[1:]:
    line = dict(mended="-", spoiled="--").get(name, ":")
    a.plot(members.sum(1), color=color, ls=line, label=name)
a.set(xlabel="epoch", ylabel="images")
a.legend(loc="center right")
bottom = torch.zeros(len(images.classes))
for name, (members, color) in groups.items():
    count = truth[members[-1]].bincount(minlength=len(images.classes))
    b.bar(images.classes, count, bottom=bottom, color=color, label=name)
    bottom += count
b.tick_params("x", rotation=60)
b.set_ylabel("images of the class, at the end")
b.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
count = {name: members[-1].sum().item() for name, (members, _) in groups.items()}
changed = (table[-1].argmax(1) != first).sum().item()
takeaway(
    f"{changed} labels have changed: {count['mended']} are mended, {count['spoiled']} spoiled, and "
    f"{changed - count['mended'] - count['spoiled']} went from one wrong name to another. {count['still wrong']} of "
    f"the {wrong.sum()} that were wrong are wrong still."
)

# %% [markdown]
# ## How does a single label get there?
#
# Each row of the table is a distribution over the classes, and every epoch moves it by the share $1 - m$ of the way.
# Here is the path of a few labels: mended ones in the first row; in the second, spoiled or still wrong ones, as far as
# there are any. (Where the first label was the true one, the blue line covers the red one.)

# %%
last_label = table[-1].argmax(1)
mended = groups["mended"][0][-1].nonzero()[:, 0][::13][:4]
failed = torch.cat([groups[name][0][-1].nonzero()[:, 0][:2] for name in ("spoiled", "still wrong")])[:4]
paths = torch.cat([mended, failed]).tolist()
figure, axes = plt.subplots(2, 4, figsize=(11, 4.4), sharex=True, sharey=True)
for ax in axes.flat[len(paths) :]:
    ax.axis("off")
for ax, i in zip(axes.flat, paths):
    ax.plot(table[:, i], color="lightgray", lw=1)
    ax.plot(table[:, i, first[i]], color=RED, ls="--", lw=2)
    ax.plot(table[:, i, truth[i]], color=BLUE, lw=2)
    ax.set_title(f"is {images.classes[truth[i]]}, first called {images.classes[first[i]]}", fontsize=9)
    inset = ax.inset_axes([0.76, 0.3, 0.24, 0.4])
    inset.imshow(images.pixels[i].permute(1, 2, 0))
    inset.axis("off")
axes[0, 0].set(xlim=(0, 1.35 * EPOCHS), ylim=(-0.03, 1.03), xticks=range(0, EPOCHS + 1, max(1, EPOCHS // 3)))
for ax in axes[-1]:
    ax.set_xlabel("epoch")
for ax in axes[:, 0]:
    ax.set_ylabel("share of the label")
lines = [plt.Line2D([], [], color=c, ls=s) for c, s in ((BLUE, "-"), (RED, "--"), ("lightgray", "-"))]
figure.legend(lines, ["true class", "first label", "other classes"], loc="outside upper center", ncols=3)
plt.show()
crossing = (table[:, wrong].argmax(2) == truth[wrong]).float()[:, now_right[-1][wrong]]  # (E + 1, mended)
turn = crossing.argmax(0).float().median() if crossing.shape[1] else float("nan")
takeaway(
    "a label turns over when the votes against it outweigh what is left of it: half of the mended ones by epoch "
    f"{turn:.0f}."
)

# %% [markdown]
# ## What goes into q?
#
# If $q$ were simply the student's own answer, the labels would tend to confirm themselves: the student has been trained
# on them. tclip asks around instead. It averages the answers over the image's nearest *neighbours* in the student's
# embedding (the image itself is one of them): this is the $p_{ic}$ of the trust. Then it sharpens the mean, that is,
# raises it to a power $s$, and balances the whole table over the classes as in notebook 1:
#
# $$q = \text{balance}\big(p^{\,s}\big)$$
#
# Look at a few images whose first label is wrong, each the first of its row, and at their neighbours when
# training is over, with the first labels (red: wrong).

# %%
z = embeddings["ensemble labels"]
shown = mended[:3] if len(mended) else torch.arange(3)
near = (z[shown] @ z.T).topk(12).indices  # (3, 12), the image itself comes first
names = [images.classes[c] for c in first[near.flatten()]]
colors = [RED if w else BLUE for w in wrong[near.flatten()].tolist()]
show_images(images.pixels[near.flatten()], names, columns=12, colors=colors, side=0.75)
plt.show()

settings_used = trained["ensemble labels"]
k = settings_used.label_neighbours
own_class = {}  # run: of the wrongly labelled images, the share of their k nearest others that are of their true class
for name, rows in embeddings.items():
    count = tclip.neighbour_mean(rows, F.one_hot(truth).float(), k + 1) * (k + 1)  # (N, C), the image itself included
    own_class[name] = ((count.gather(1, truth[:, None])[:, 0] - 1) / k)[wrong].mean()
takeaway(
    f"of the {k} nearest others of a wrongly labelled image {own_class['frozen labels']:.0%} are of its true class "
    f"even where labels stay as they are, and {own_class['ensemble labels']:.0%} where they were mended on the way."
)

# %% [markdown]
# ## What does each of the steps add?
#
# Take the answers of a student that was trained with *frozen* labels, and so has memorised much of the noise. Apply the
# steps of `end_epoch` to them, one after the other, and count what is right. (`end_epoch` has the answers about
# augmented views from during the epoch; these are about the images as they are.)

# %%
own = said["frozen labels"][-1]
around = tclip.neighbour_mean(embeddings["frozen labels"], own, max(k, 1))
sharp = around**settings_used.label_sharpness
sharp = sharp / sharp.sum(1, keepdim=True)
agree, s = tclip.consensus(around), settings_used.label_sharpness
w = agree**s / (agree**s + (1 - agree) ** s)  # the trust
balanced = tclip.balance(sharp)
steps = {
    "first labels": tables["frozen labels"][0],
    "student's own answers": own,
    "mean over neighbours": around,
    "sharpened": sharp,
    "balanced: this is q": balanced,
    "with the teacher's share": torch.lerp(tables["frozen labels"][0], balanced, w),
}
figure, (a, b) = plt.subplots(1, 2, figsize=(9.5, 2.8), sharey=True)
for ax, values, label in (
    (a, [100 * rightness(q, slice(None)) for q in steps.values()], "right, in %"),
    (b, [100 * q.max(1).values.mean().item() for q in steps.values()], "mean confidence, in %"),
):
    bars = ax.barh(list(steps), values, color=[SKY, BLUE, GREEN, ORANGE, RED, BLACK])
    ax.bar_label(bars, fmt=" %.1f")
    ax.set(xlabel=label, xlim=(0, 112))
a.invert_yaxis()
plt.show()
takeaway(
    f"the student's own answers are {rightness(own, slice(None)):.1%} right, their mean over neighbours "
    f"{rightness(around, slice(None)):.1%}, and balanced {rightness(balanced, slice(None)):.1%}. Sharpening changes no "
    f"name, but confidence: from {around.max(1).values.mean():.0%} to {sharp.max(1).values.mean():.0%}."
)

# %% [markdown]
# Here it is the neighbours' mean that makes the table more right. What the other steps do shows over many epochs.
# Averages that are averaged again each epoch would fade towards grey; the sharpening works against that. The balance is
# in the labels already that this student learned from; what happens without it is in [results](results/README.md). The
# teacher's share, $(1 - w)\,T_0$, is what keeps labels from drifting wherever the student goes.
#
# ## What do the lines of the class do?
#
# Four functions do all of that: one that asks the neighbours, one that asks how much of one mind they are, one that
# listens during the epoch, one that mixes at its end.

# %%
show_source(tclip.neighbour_mean, tclip.consensus, tclip.EnsembleLabels.record, tclip.EnsembleLabels.end_epoch)

# %% [markdown]
# * `everyone` and `total` gather rows and sums from all processes, where several train one student. Where it is one,
#   they give back what they got: read over them.
# * `pool`: with very many images the neighbours are sought among some of them, drawn at random, so that the cost of an
#   image does not grow with their number.
# * `rows @ bank` are cosines, since all rows have length one; `topk` takes the nearest, and `said[nearest].mean(1)` is
#   the mean of their answers.
# * `index_add_`: an image comes twice in a batch, in two views. `self.predictions[index] += probs` would count one.
# * `views`: each prediction sums to one, so the sum over the classes says how many were recorded. Images that were not
#   seen have none, and keep their label.
# * `consensus`: the formula above for $a$, asked before $q$ is sharpened, which would make neighbours look surer than
#   they are.
# * `lerp(start, q, trust)` is $(1 - w)\,T_0 + w\,q$; the second `lerp` is the step with $m$.
# * `.half()`: tables are kept with 16 bits a number, since with many images and classes they get large.
#
# **Take-away: listen during the epoch, ask around at its end, and go part of the way.**
#
# ## Exercises
#
# **1.** Let labels follow the student alone: `label_neighbours=0`. Then leave out the balance as well:
# `class_prior="none"`. Which class suffers?
#
# <details><summary>Answer</summary>
#
# ```python
# for changes in (dict(label_neighbours=0), dict(label_neighbours=0, class_prior="none")):
#     config = tclip.complete(tclip.Config(**settings, **changes))
#     student, labels = tclip.train(config, images, probs)
#     print(changes, tclip.score(labels.table, truth)["per_class"])
# ```
# Without the balance nothing says that a class is called too seldom, and the one that CLIP hardly ever names has little
# to start from. Compare your numbers with those of the runs above, `tclip.score(table[-1], truth)["per_class"]`, before
# you believe this.
# </details>
#
# **2.** What happens to the table with `label_momentum=1`, and what with `0`?
#
# <details><summary>Answer</summary>
#
# With 1 nothing: the labels are frozen, as in the first run. With 0 nothing is remembered: each label is the latest mix
# of the teacher's answer and the student's, and one bad epoch is felt at once.
# </details>
#
# **3.** Without truth you cannot draw the blue and the red line. What could you watch instead, to see whether labels go
# astray?
#
# <details><summary>Answer</summary>
#
# `metrics.csv` has `labels_changed` for each epoch, the share of images no longer called as the teacher does: it should
# level off; and `trust`, which should rise. The sizes of the classes, `labels.table.mean(0)`, should stay near what you
# know of them (balanced labels do so by themselves). And look at images whose label changed, twenty of them:
# `labels.csv` has a column for that.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
