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
# # 4. What does the training loop do, line by line?
#
# This notebook builds the loop up, from the least that trains to [`train`](../tclip.py), which is then shown whole:
# each version adds to the one before it, and the last ends with the same weights as `tclip.train`, to the bit. After
# that: how an interrupted run goes on, and what the student has learned.
#
# In [tclip.py](../tclip.py) these are the sections *Augmentation*, *Student* and *Training*.

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
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, ORANGE, PINK, show_images, show_map, show_source, takeaway
from sklearn.manifold import TSNE

import tclip

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # few images and epochs, to test that all cells run
EPOCHS = 2 if QUICK else 10

config = tclip.Config(**tclip.DATASETS["digits"]["settings"], epochs=EPOCHS, device="cpu", cache="none")
images, _, classes = tclip.read_dataset(config)
images = tclip.Images(**{name: part[: 200 if QUICK else None] for name, part in vars(images).items()})
pixels, probs, N, C = images.pixels, images.probs, len(images.pixels), len(classes)
LR = config.lr * config.batch_size / 256  # the peak of train()'s schedule
VIEWS = tclip.VIEWS[config.views]
print(*(f"{name} {getattr(config, name)}" for name in ("arch", "size", "views", "batch_size", "lr")), sep=" | ")

# %% [markdown]
# ## What does the student see?
#
# **In short:** never the same picture twice, and each time the same label.
#
# Each time an image is used, `augment` makes a random *view* of it: a part of it or all of it at another size, turned,
# brighter or darker. How strongly depends on what the images show: writing must not be mirrored, a photo may. Here are
# the originals in the first column, and views of them in the others.
#
# Every image has a draw of its own: `draw_views` draws the parameters for a whole batch, and `augment` applies them.
# (torchvision's transforms draw once for a batch, so that all its images would be cut alike.) Below the picture
# are four more draws, one in a column. The first four are in shares of the image's side: a width below one shows a part
# of the image, one above it all of it with a margin. The angle is in degrees; *mirrored* is one or zero, for writing
# always zero; the last three are factors.

# %%
print(config.views, "=", VIEWS)
torch.manual_seed(0)
columns = [pixels[:4].float() / 255] + [tclip.augment(pixels[:4], **VIEWS) for _ in range(9)]
show_images(torch.stack(columns, 1).flatten(0, 1), columns=10, side=0.9)
plt.show()
draw = tclip.draw_views(4, **{k: v for k, v in VIEWS.items() if k != "padding"})
for name, values in draw.items():
    print(f"{name:11}", "  ".join(f"{v:6.2f}" for v in values.tolist()))
takeaway(f"a view is {len(draw)} numbers, drawn anew each time; the label stays, so the student must see past them.")

# %% [markdown]
# ## What is the student?
#
# **In short:** a small ResNet with two heads, one for names and one for the contrastive loss.
#
# A small ResNet, the *backbone*, turns an image into a vector of features. On top of it lie two heads. The
# *classifier*, one linear layer, makes logits of them, and so names. The *projector*, two layers, makes the embedding
# of length one that the contrastive loss compares. (Such a head of its own is usual since SimCLR: the loss can make the
# embedding forget what tells two views apart, without taking it from the features.)

# %%
blank = tclip.Student(config.arch, C, config.size)
logits, z = blank(pixels[:2].float() / 255)
print("logits", tuple(logits.shape), "| embeddings", tuple(z.shape), "of length", f"{z[0].norm():.3f}")
weights = {name: sum(p.numel() for p in part.parameters()) for name, part in blank.named_children()}
takeaway("the student's weights: " + ", ".join(f"{count:,} of the {name}" for name, count in weights.items()) + ".")

# %% [markdown]
# ## What is the least that trains?
#
# **In short:** a student, an optimizer, cross-entropy with CLIP's names, and a short loop.
#
# `report` keeps how right the student is on all images. It is trained on these same images, but with labels of which
# some are wrong: this is the *transductive* accuracy.

# %%
curves = {}


def report(name, student):
    accuracy = tclip.score(tclip.predict(student, pixels), images.truth)["accuracy"]
    curves.setdefault(name, []).append(accuracy)


def first_version():
    """Cross-entropy with CLIP's best name, at a constant learning rate."""
    torch.manual_seed(0)
    student = tclip.Student(config.arch, C, config.size)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    names = probs.argmax(1)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            logits, _ = student(tclip.augment(pixels[index], **VIEWS))
            loss = F.cross_entropy(logits, names[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report("1 cross-entropy, hard labels", student)


first_version()
teacher = tclip.score(probs, images.truth)["accuracy"]
takeaway(
    f"this short loop makes a student that is {curves['1 cross-entropy, hard labels'][-1]:.1%} right, of a teacher "
    f"that is {teacher:.1%} right. It has the names from CLIP alone, mistakes included."
)

# %% [markdown]
# ## What does the contrastive loss need?
#
# **In short:** two views of each image in one batch, and labels that say how sure they are.
#
# The two views come one after the other, as [`class_conditional_contrastive_loss`](../tclip.py) expects: row $i$ and
# row $i + B$ belong together. Cross-entropy simply has twice as many rows. Labels that say how sure they are: CLIP's
# probabilities instead of its best name.


# %%
def second_version():
    """... with soft labels, two views and the contrastive loss."""
    torch.manual_seed(0)
    student = tclip.Student(config.arch, C, config.size)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            targets = probs[index]  # (B, C)
            logits, z = student(tclip.augment(pixels[index], views=2, **VIEWS))  # (2B, C), (2B, D)
            loss = F.cross_entropy(logits, targets.repeat(2, 1))
            loss = loss + tclip.class_conditional_contrastive_loss(z, targets, config.temperature, config.class_share)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report("2 + soft labels, C3L", student)


second_version()
takeaway(
    f"the same loop with soft labels and C3L: {curves['2 + soft labels, C3L'][-1]:.1%}, at twice the work. One seed "
    "and few epochs are no verdict on either."
)

# %% [markdown]
# ## And the ensemble labels?
#
# **In short:** three calls: `targets`, `record`, `end_epoch`.
#
# `targets` in place of the fixed table; `record` what the student says, after each step; `end_epoch` mends the table by
# it ([notebook 3](03_ensemble_labels.ipynb)). The student says it anyway, so this costs next to nothing. The sum of the
# two losses, with the weight of the second, has a name in tclip, `tclip_objective`.

# %%
show_source(tclip.tclip_objective)


def ensemble_labels():
    shares = tclip.class_shares(config.class_prior, range(C))  # none are known here
    rule = config.label_momentum, config.label_neighbours, shares, max(1, config.epochs // 8)  # the last: the trial
    return tclip.EnsembleLabels(probs, images.features, *rule)


def third_version():
    """... with labels that follow the student."""
    torch.manual_seed(0)
    student, labels = tclip.Student(config.arch, C, config.size), ensemble_labels()
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            logits, z = student(tclip.augment(pixels[index], views=2, **VIEWS))
            classification, contrastive = tclip.tclip_objective(logits, z, index, labels, config)
            optimizer.zero_grad()
            (classification + contrastive).backward()
            optimizer.step()
            labels.record(index.repeat(2), logits.softmax(1), z)
        labels.end_epoch()
        report("3 + ensemble labels", student)


third_version()
takeaway(f"with labels that follow: {curves['3 + ensemble labels'][-1]:.1%}.")

# %% [markdown]
# ## What is left to make it train()?
#
# **In short:** no more ideas, only craft.
#
# * **A schedule.** [`learning_rate`](../tclip.py) rises for a moment, then falls to zero along a cosine: large steps to
#   find the way, small ones to settle.
# * **Nesterov momentum and weight decay**, as is usual for ResNets.
# * **Even batches.** `split` leaves a small last batch, in which a contrastive loss has few others to compare with;
#   `tensor_split` makes all nearly equal.
# * **Seeds by epoch.** The random draws of an epoch depend on its number alone. So a run that is resumed draws as if it
#   had never stopped.
# * **Speed.** bfloat16 where the hardware has it, and `channels_last`, the memory layout that convolutions like best.


# %%
def last_version():
    """What tclip.train does in one process, without its checkpoint, its log and its messages."""
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    student = tclip.Student(config.arch, C, config.size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    labels, steps = ensemble_labels(), math.ceil(N / config.batch_size)
    for epoch in range(config.epochs):
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))
        student.train()
        for step, index in enumerate(torch.randperm(N).tensor_split(steps)):
            progress = (epoch + (step + 0.5) / steps) / config.epochs
            optimizer.param_groups[0]["lr"] = tclip.learning_rate(config, progress)
            views = tclip.augment(pixels[index], views=2, **VIEWS)
            with torch.autocast(device.type, torch.bfloat16, enabled=tclip.has_fast_bfloat16(device)):
                logits, z = student(views.contiguous(memory_format=torch.channels_last))
            logits = logits.float()
            classification, contrastive = tclip.tclip_objective(logits, z, index, labels, config)
            optimizer.zero_grad()
            (classification + contrastive).backward()
            optimizer.step()
            labels.record(index.repeat(2), logits.softmax(1), z)
        labels.end_epoch()
        report("4 + schedule: as train()", student)
    return student, labels


def same(a, b):
    """Whether two networks have the same weights, or two EnsembleLabels the same labels, to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


student, labels = last_version()
reference, reference_labels = tclip.train(config, pixels, probs, images.features)
assert same(student, reference) and same(labels, reference_labels)
takeaway(
    f"our loop and tclip.train end with the same weights, to the bit: {same(student, reference)}; with the same "
    f"labels: {same(labels, reference_labels)}."
)

# %% [markdown]
# Here are the four versions, each with one seed. More than one thing changes between versions, and another seed gives
# other numbers: this is a picture of the way, not a measurement of its parts.

# %%
figure, ax = plt.subplots(figsize=(9, 4.6))
for (name, curve), color, line in zip(curves.items(), (BLACK, ORANGE, PINK, BLUE), (":", "-.", "--", "-")):
    ax.plot(range(1, EPOCHS + 1), [100 * a for a in curve], color=color, ls=line, lw=2.5, label=name)
ax.axhline(100 * teacher, color="gray", label="the teacher")
ax.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
ax.set(xlabel="epoch", ylabel="right, in %", ylim=(0, 100))
ax.legend(loc="lower right")
plt.show()
takeaway("in the end " + ", ".join(f"{curve[-1]:.1%} ({name})" for name, curve in curves.items()) + ".")

# %% [markdown]
# Now you can read `train` itself, whole. Among what it has in addition: `whole_batch`, `rank` and `world` do nothing
# where one process trains, `.to(device)` brings batches to a GPU, the losses are added up on the device, so that no
# step waits for a number to print, and each epoch leaves a row of the log and a checkpoint.

# %%
show_source(tclip.train)

# %% [markdown]
# ## What if the power fails?
#
# **In short:** the run goes on from the last epoch, to the same result.
#
# With a folder for its argument `out`, `train` writes a checkpoint after each epoch: to a draft first, which then
# replaces the old one at once, so that there always is a whole one. Call it again with the same arguments, and it goes
# on. Let us pull the plug, in the shape of an exception, just before the second epoch is saved.

# %%
short = replace(config, epochs=3)
uninterrupted, uninterrupted_labels = tclip.train(short, pixels, probs, images.features)
ran = []


class PowerFailure(Exception):
    pass


def pull_the_plug(row, student, labels):
    if row["epoch"] == 2:
        raise PowerFailure


with tempfile.TemporaryDirectory() as folder:
    arguments = (short, pixels, probs, images.features, Path(folder))
    try:
        tclip.train(*arguments, on_epoch=pull_the_plug)
    except PowerFailure:
        saved = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
        print("the light is out; epochs in the checkpoint:", len(saved["history"]), "| it holds:", ", ".join(saved))
    resumed, resumed_labels = tclip.train(*arguments, on_epoch=lambda row, *_: ran.append(row["epoch"]))
print("epochs that were run after it came back:", ran)
takeaway(
    "the resumed run and the uninterrupted one have the same weights, to the bit: "
    f"{same(resumed, uninterrupted)}; and the same labels: {same(resumed_labels, uninterrupted_labels)}."
)

# %% [markdown]
# The random draws need not be kept, as they follow from the epoch's number. On the command line:
# `python tclip.py --resume runs/digits`.
#
# ## What has the student learned?
#
# **In short:** after so few epochs a part of what its teacher confused; with more of them nearly all.
#
# Look at its embedding, before and after (that is, of `tclip.train` above). t-SNE draws a map on which neighbours stay
# neighbours; sizes of and distances between its islands mean little, its axes nothing. An image is a dot; where there
# is room the digit says its true class, which the student never saw. Orange crosses and digits are those that CLIP
# named wrongly. (How it ends after all epochs: [results](benchmark/results/README.md).)

# %% tags=["picture"]
chosen = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:600]
truth, misnamed = images.truth[chosen], (probs.argmax(1) != images.truth)[chosen]
torch.manual_seed(config.seed)
with torch.inference_mode():
    students = tclip.Student(config.arch, C, config.size).eval(), reference
    before, after = (student(pixels[chosen].float() / 255)[1] for student in students)
tsne = TSNE(perplexity=30, init="pca", random_state=0, max_iter=300 if QUICK else 750)
first_map, last_map = (tsne.fit_transform(z.numpy()) for z in (before, after))

figure, axes = plt.subplots(1, 2, figsize=(9, 4.8))
for ax, points, title in zip(axes, (first_map, last_map), ("before", "after")):
    show_map(ax, points, truth.tolist(), misnamed.numpy(), title)
plt.show()
K = 10


def of_own_class(z):
    """Share of an image's K nearest that are of its class: of all images, and of those that CLIP named wrongly."""
    near = (z @ z.T).fill_diagonal_(-1).topk(K).indices
    share = (truth[near] == truth[:, None]).float().mean(1)
    return share.mean(), share[misnamed].mean()


takeaway(
    f"of the {K} nearest in the embedding {of_own_class(before)[0]:.0%} are of the same class before training and "
    f"{of_own_class(after)[0]:.0%} after it; for images that CLIP named wrongly {of_own_class(before)[1]:.0%} and "
    f"{of_own_class(after)[1]:.0%}."
)

# %% [markdown]
# ## Exercises
#
# **1.** In `third_version`, comment out the line with `labels.record`. Does it fail, and what does it train now?
#
# <details><summary>Answer</summary>
#
# It does not fail: `end_epoch` keeps the label of every image that was not seen, and now none was. The labels stay as
# they were at the start.
# </details>
#
# **2.** Add a *mean teacher*: a copy of the student whose weights follow slowly, and whose answers are recorded in
# place of the student's. Where does it go?
#
# <details><summary>Answer</summary>
#
# Before the loop: `shadow = copy.deepcopy(student)` (and `import copy`). In place of the line with `labels.record`:
#
# ```python
# with torch.no_grad():
#     for slow, fast in zip(shadow.parameters(), student.parameters()):
#         slow.lerp_(fast, 0.01)
#     logits, z = shadow(tclip.augment(pixels[index], views=2, **VIEWS))
# labels.record(index.repeat(2), logits.softmax(1), z)
# ```
# It costs one more forward pass a step. You have changed the method: now measure it, with more than one seed.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
