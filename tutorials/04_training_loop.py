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
# [![Open in Colab][badge]][colab]
#
# This notebook builds the loop up, from the least that trains to [`train`](../tclip.py): each version adds to the one
# before it, and the last is compared with `tclip.train`, bit by bit. On the way: what the student sees, where the time
# goes, how an interrupted run goes on, and what the student has learned.
#
# In [tclip.py](../tclip.py) these are the sections *Augmentation* (`augment`, `draw_views`, `apply_views`), *Student*
# and *Training* (`train`, `train_epoch`, `learning_rate`).
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/04_training_loop.ipynb

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
import math
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, ORANGE, PINK, RED, SKY, show_images, show_source, takeaway
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # a few epochs on a part of the images, to test that all cells run
EPOCHS = 3 if QUICK else 10

teacher = tclip.load_clip("offline")
images = tclip.load_images("digits", teacher=teacher)
if QUICK:
    images = tclip.Images(
        images.pixels[:200], images.names[:200], images.classes, images.truth[:200], images.features[:200]
    )
prompts = tclip.text_classifier(teacher, images.classes, tclip.DATASETS["digits"].templates)
probs = tclip.zero_shot_probs(images.features, prompts)  # (N, C), the pseudo-labels of notebook 1
pixels, N, C = images.pixels, len(images.pixels), len(images.classes)

config = tclip.complete(tclip.Config(epochs=EPOCHS, device="cpu"))  # complete(): fills in what the data set decides
LR = config.lr * config.batch_size / 256  # as train() scales it
print(*(f"{name} {getattr(config, name)}" for name in ("arch", "size", "views", "batch_size", "lr")), sep=" | ")

# %% [markdown]
# ## What does the student see?
#
# Never the same picture twice. Each time an image is used, `augment` makes a random *view* of it: a part of it or all
# of it at another size, turned, brighter or darker. How strongly depends on what the images show: writing must not be
# mirrored, a photo may. Here are the originals in the first column, and views of them in the others.

# %%
print(config.views, "=", tclip.VIEWS[config.views])
torch.manual_seed(0)
columns = [pixels[:5].float() / 255] + [tclip.augment(pixels[:5], **tclip.VIEWS[config.views]) for _ in range(9)]
show_images(torch.stack(columns, 1).flatten(0, 1), columns=10, side=0.7)
plt.show()

# %% [markdown]
# Every image has a draw of its own: `draw_views` draws the parameters for a whole batch, and `apply_views` applies
# them. (With one draw for a whole batch, as torchvision's transforms make it, all images of a batch would be cut
# alike.) Here are the draws of four views, one in a column. The first four are in shares of the image's side: a width
# of 0.8 shows a part of the image, one of 1.2 all of it with a margin. The angle is in degrees, and the last three are
# factors.
#
# Window, rotation and mirror together are one matrix of 2 x 3 numbers for each view (`theta` in `apply_views`). It says
# for each point of the view where in the image it comes from, and `grid_sample` reads all of them at once.

# %%
draw = tclip.draw_views(4, **{k: v for k, v in tclip.VIEWS[config.views].items() if k != "padding"})
for name, values in draw.items():
    print(f"{name:11}", "  ".join(f"{v:6.2f}" for v in values.tolist()))
takeaway(
    f"a view is described by {len(draw)} numbers, drawn anew each time; the label stays, so the student must learn to "
    "see past them."
)

# %% [markdown]
# ## What is the student?
#
# A small ResNet, the *backbone*, turns an image into a vector of features. On top of it lie two heads. The
# *classifier*, one linear layer, makes logits of them, and so names. The *projector*, two layers, makes the embedding
# of length one that the contrastive loss compares. (Such a head of its own is usual since SimCLR: the loss can then
# make the embedding forget what tells two views apart, without taking it from the features.)

# %%
blank = tclip.Student(config.arch, C, config.size)
logits, z = blank(pixels[:2].float() / 255)
print("logits", tuple(logits.shape), "| embeddings", tuple(z.shape), "of length", f"{z[0].norm():.3f}")
weights = {name: sum(p.numel() for p in part.parameters()) for name, part in blank.named_children()}
takeaway("the student's weights: " + ", ".join(f"{count:,} of the {name}" for name, count in weights.items()) + ".")

# %% [markdown]
# ## What is the least that trains?
#
# A student, an optimizer, cross-entropy with CLIP's names. The embedding we ignore at first.
#
# `report` keeps how right the student is on all images. It was trained on these same images, but with labels of which
# some are wrong: this is the *transductive* accuracy.

# %%
curves = {}


def report(name, student):
    curves.setdefault(name, []).append(tclip.evaluate(student, images)["accuracy"])


def first_version():
    """Cross-entropy with CLIP's best name, at a constant learning rate."""
    torch.manual_seed(0)
    student = tclip.Student(config.arch, C, config.size)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    names = probs.argmax(1)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            view = tclip.augment(pixels[index], **tclip.VIEWS[config.views])
            logits, _ = student(view)
            loss = F.cross_entropy(logits, names[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report("1 cross-entropy, hard labels", student)
    return student


first_version()
teacher_accuracy = tclip.score(probs, images.truth)["accuracy"]
takeaway(
    f"this short loop makes a student that is {curves['1 cross-entropy, hard labels'][-1]:.1%} right, of a teacher "
    f"that is {teacher_accuracy:.1%} right. It has the names from CLIP alone, mistakes included."
)

# %% [markdown]
# (It may be better than its teacher because these epochs are too few to memorise all mistakes. In
# [notebook 5](05_benchmark.ipynb) cross-entropy goes on for longer, and ends about as right as its teacher.)
#
# ## What does the contrastive loss need?
#
# Two views of each image in one batch, one after the other, as [`class_conditional_contrastive_loss`](../tclip.py)
# expects: row $i$ and row $i + B$ belong together. Cross-entropy simply has twice as many rows. And labels that say how
# sure they are: CLIP's probabilities, balanced, instead of its best name ([notebook 1](01_pseudo_labels.ipynb)).
# As long as these are the teacher's, the loss pulls by class alone: `class_share=1`.


# %%
def second_version():
    """... with soft, balanced labels, two views and the contrastive loss."""
    torch.manual_seed(0)
    student = tclip.Student(config.arch, C, config.size)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    targets = tclip.balance(probs)  # (N, C)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            views = tclip.augment(pixels[index], views=2, **tclip.VIEWS[config.views])
            logits, z = student(views)  # (2B, C), (2B, D)
            loss = F.cross_entropy(logits, targets[index].repeat(2, 1))
            loss = loss + config.c3l_weight * tclip.class_conditional_contrastive_loss(
                z, targets[index], config.temperature, class_share=1.0, negatives=config.negatives
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        report("2 + soft labels, C3L", student)
    return student


second_version()
takeaway(
    f"the same loop with soft balanced labels and the contrastive loss: {curves['2 + soft labels, C3L'][-1]:.1%}, at "
    "twice the work for each image."
)

# %% [markdown]
# ## And the ensemble labels?
#
# Three calls. `targets` in place of the fixed table; `record` what the student says, after each step; `end_epoch` mixes
# it in ([notebook 3](03_ensemble_labels.ipynb)). The student says it anyway, so this costs next to nothing.
#
# And the trust $w$ that comes of it, `labels.trust`, has a second use: the contrastive loss pulls classmates together
# with the share $1 - w$, and otherwise only the two views of an image
# ([notebook 2](02_class_conditional_contrast.ipynb)). To tell images apart helps where alike ones share a class. Where
# they do not, as in the first epoch, it would only take from what the network learns of the classes.


# %%
def third_version():
    """... with labels that follow the student."""
    torch.manual_seed(0)
    student = tclip.Student(config.arch, C, config.size)
    optimizer = torch.optim.SGD(student.parameters(), lr=LR, momentum=0.9)
    labels = tclip.EnsembleLabels(probs, config.label_momentum, config.label_neighbours, config.label_sharpness)
    for _ in range(EPOCHS):
        student.train()
        for index in torch.randperm(N).split(config.batch_size):
            views = tclip.augment(pixels[index], views=2, **tclip.VIEWS[config.views])
            targets = labels.targets(index)
            logits, z = student(views)
            loss = F.cross_entropy(logits, targets.repeat(2, 1))
            loss = loss + config.c3l_weight * tclip.class_conditional_contrastive_loss(
                z, targets, config.temperature, 1 - labels.trust, config.negatives
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            labels.record(index.repeat(2), logits.softmax(1), z)
        labels.end_epoch()
        report("3 + ensemble labels", student)
    return student


third_version()
takeaway(f"with labels that follow: {curves['3 + ensemble labels'][-1]:.1%}.")

# %% [markdown]
# ## What is left to make it train()?
#
# No more ideas, only craft:
#
# * **A schedule.** [`learning_rate`](../tclip.py) rises for a moment, then falls to zero along a cosine: large steps to
#   find the way, small ones to settle.
# * **Nesterov momentum and weight decay**, as is usual for ResNets.
# * **Even batches.** `split` leaves a small last batch, in which a contrastive loss has few others to compare with;
#   `tensor_split` makes all nearly equal.
# * **Seeds by epoch.** The random draws of an epoch depend on its number alone. So a run that is resumed draws as if it
#   had never stopped.
# * **Speed.** bfloat16 where the hardware has it, and `channels_last`, the memory layout that convolutions like best.
#
# The learning rate over the run:

# %%
progress = torch.linspace(0, 1, 400)
figure, ax = plt.subplots(figsize=(6, 2.4))
ax.plot(progress * EPOCHS, [tclip.learning_rate(config, p) for p in progress.tolist()], color=BLUE)
ax.set(xlabel="epoch", ylabel="learning rate")
plt.show()


# %%
def last_version():
    """What tclip.train does, without its checkpoint, its log and its messages."""
    torch.manual_seed(config.seed)
    device = tclip.pick_device(config.device)
    student = tclip.Student(config.arch, C, config.size).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True)
    labels = tclip.EnsembleLabels(
        probs, config.label_momentum, config.label_neighbours, config.label_sharpness, config.class_prior == "uniform"
    )
    steps = math.ceil(N / config.batch_size)
    for epoch in range(config.epochs):
        student.train()
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))
        for step, index in enumerate(torch.randperm(N).tensor_split(steps)):
            for group in optimizer.param_groups:
                group["lr"] = tclip.learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
            views = tclip.augment(pixels[index], views=2, **tclip.VIEWS[config.views])
            targets = labels.targets(index)
            with torch.autocast(device.type, torch.bfloat16, enabled=tclip.has_fast_bfloat16(device)):
                logits, z = student(views.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), targets.repeat(2, 1))
            loss = loss + config.c3l_weight * tclip.class_conditional_contrastive_loss(
                z, targets, config.temperature, 1 - labels.trust, config.negatives
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            labels.record(index.repeat(2), logits.float().softmax(1), z)
        labels.end_epoch()
        report("4 + schedule: as train()", student)
    return student, labels


student, labels = last_version()
reference, reference_labels = tclip.train(config, images, probs)


def same_bits(student, other):
    pairs = zip(student.state_dict().values(), other.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


takeaway(
    f"our loop and tclip.train end with the same weights, to the bit: {same_bits(student, reference)}; with the same "
    f"labels: {torch.equal(labels.table, reference_labels.table)}."
)

# %% [markdown]
# tclip keeps the inner loop in a function of its own. Compare it with yours. What it has in addition: `whole_batch` and
# `ranks` do nothing where one process trains, `.to(device)` brings batches to a GPU, and the losses are added up where
# they are, so that no step waits for a number to print. `train`, around it, adds the checkpoint and a row of the log
# for each epoch.

# %%
show_source(tclip.train_epoch)

# %% [markdown]
# Here are the four versions, each with one seed. More than one thing changes between versions, and another seed gives
# other numbers: this is a picture of the way, not a measurement of its parts.

# %%
figure, ax = plt.subplots(figsize=(7.5, 3.2))
for (name, curve), color, line in zip(curves.items(), (BLACK, ORANGE, PINK, BLUE), (":", "-.", "--", "-")):
    ax.plot(range(1, EPOCHS + 1), [100 * a for a in curve], color=color, ls=line, label=name)
ax.axhline(100 * teacher_accuracy, color="gray", lw=1, label="the teacher")
ax.set(xlabel="epoch", ylabel="right, in %", ylim=(0, 100))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
takeaway("in the end " + ", ".join(f"{curve[-1]:.1%} ({name})" for name, curve in curves.items()) + ".")

# %% [markdown]
# ## Where does the time go?
#
# Measure the parts of a step, several times, and take the median. (On a GPU one would have to wait for it before
# reading the clock, as `torch.cuda.synchronize` does; here it is a CPU.)

# %%
parts = {"gather, augment": [], "forward": [], "losses": [], "backward, step": [], "record": []}
optimizer = torch.optim.SGD(student.parameters(), 0.0)
student.train()
for _ in range(3 if QUICK else 12):
    index = torch.randperm(N)[: config.batch_size]
    clock = [time.perf_counter()]
    views = tclip.augment(pixels[index], views=2, **tclip.VIEWS[config.views])
    clock.append(time.perf_counter())
    with torch.autocast("cpu", torch.bfloat16, enabled=tclip.has_fast_bfloat16(torch.device("cpu"))):
        logits, z = student(views.contiguous(memory_format=torch.channels_last))
    clock.append(time.perf_counter())
    targets = labels.targets(index)
    loss = F.cross_entropy(logits.float(), targets.repeat(2, 1))
    loss = loss + tclip.class_conditional_contrastive_loss(z, targets)
    clock.append(time.perf_counter())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    clock.append(time.perf_counter())
    labels.record(index.repeat(2), logits.float().softmax(1), z)
    clock.append(time.perf_counter())
    for part, before, after in zip(parts.values(), clock, clock[1:]):
        part.append(1000 * (after - before))
milliseconds = {name: torch.tensor(part).median().item() for name, part in parts.items()}

begun = time.perf_counter()
labels.end_epoch()
epoch_end = 1000 * (time.perf_counter() - begun)
steps = math.ceil(N / config.batch_size)
milliseconds["end_epoch, its share"] = epoch_end / steps

figure, ax = plt.subplots(figsize=(7, 2.4))
bars = ax.barh(list(milliseconds), list(milliseconds.values()), color=SKY)
ax.bar_label(bars, fmt=" %.1f")
ax.invert_yaxis()
ax.set(xlabel="milliseconds for a step", xlim=(0, 1.15 * max(milliseconds.values())))
plt.show()
total = sum(milliseconds.values())
network = milliseconds["forward"] + milliseconds["backward, step"]
takeaway(
    f"{network / total:.0%} of the time is the network's; the losses take {milliseconds['losses'] / total:.1%} and the "
    f"ensemble labels {(milliseconds['record'] + milliseconds['end_epoch, its share']) / total:.1%}."
)

# %% [markdown]
# ## What if the power fails?
#
# With a folder for its argument `out`, `train` writes a checkpoint after each epoch: to a draft first, which then
# replaces the old one at once, so that there always is a whole one. Call it again with the same arguments, and it goes
# on. Let us pull the plug, in the shape of an exception, just before the second epoch is saved.

# %%
short = replace(config, epochs=3)
uninterrupted, uninterrupted_labels = tclip.train(short, images, probs)


class PowerFailure(Exception):
    pass


def pull_the_plug(row, student, labels):
    if row["epoch"] == 2:
        raise PowerFailure


with tempfile.TemporaryDirectory() as folder:
    try:
        tclip.train(short, images, probs, Path(folder), on_epoch=pull_the_plug)
    except PowerFailure:
        saved = tclip.read_tensors(Path(folder) / "checkpoint.pt")
        print("the light is out; in the folder:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))
        print("epochs in the checkpoint:", len(saved["history"]), "| it holds:", ", ".join(saved))
    ran = []
    resumed, resumed_labels = tclip.train(short, images, probs, Path(folder), lambda row, *_: ran.append(row["epoch"]))
print("epochs that were run after it came back:", ran)
takeaway(
    "the resumed run and the uninterrupted one have the same weights, to the bit: "
    f"{same_bits(resumed, uninterrupted)}; and the same labels: "
    f"{torch.equal(resumed_labels.table, uninterrupted_labels.table)}."
)

# %% [markdown]
# Five things have to be kept for that: the weights, the optimizer's momentum, the table of labels, the table that it
# started as, and how many epochs are done. (The settings are there to notice if it is another run.) The random draws
# need not be kept, as they follow from the epoch's number. On the command line it is `python tclip.py --resume
# runs/digits`.
#
# ## What has the student learned?
#
# Look at its embedding, before and after (that is, of `tclip.train` above). PCA shows the two directions in which the
# embeddings of the images differ most; t-SNE draws a map on which neighbours stay neighbours (sizes of and distances
# between its islands mean little; its axes have no meaning). Each digit is drawn as itself, coloured by the true class,
# which the student never saw. On the right are the same points again: red are the images that CLIP named wrongly.


# %%
def embed(student):
    with torch.inference_mode():
        return student.eval()(some.float() / 255)[1].numpy()


chosen = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:600]
some, some_truth = pixels[chosen], images.truth[chosen]
named_wrongly = (probs.argmax(1) != images.truth)[chosen]
torch.manual_seed(config.seed)
untrained = tclip.Student(config.arch, C, config.size)
before, after = embed(untrained), embed(reference)
tsne = TSNE(perplexity=30, init="pca", random_state=0, max_iter=300 if QUICK else 750)
flat = {name: PCA(2).fit_transform(z) for name, z in (("before", before), ("after", after))}
mapped = {name: tsne.fit_transform(z) for name, z in (("before", before), ("after", after))}

# %%
figure, axes = plt.subplots(2, 3, figsize=(12, 7.4))
shades = plt.get_cmap("viridis")(torch.linspace(0, 0.95, C).numpy())
panels = (
    ("PCA, before", flat["before"]),
    ("PCA, after", flat["after"]),
    ("PCA, after: red is what CLIP named wrongly", flat["after"]),
    ("t-SNE, before", mapped["before"]),
    ("t-SNE, after", mapped["after"]),
    ("t-SNE, after: red is what CLIP named wrongly", mapped["after"]),
)
for ax, (name, points) in zip(axes.flat, panels):
    for c in range(C):
        for wrong in (False, True):
            here = ((some_truth == c) & (named_wrongly == wrong)).numpy()
            color = shades[c] if "red" not in name else RED if wrong else "lightgray"
            ax.scatter(*points[here].T, marker=f"${c}$", s=22, color=color, linewidths=0.2)
    ax.set(title=name, xticks=[], yticks=[])
    if name.startswith("PCA"):
        ax.set(xlabel="first component", ylabel="second component")
    for side in ax.spines.values():
        side.set_visible(False)
plt.show()
K = 10


def neighbours_of_own_class(z, which):
    z = torch.from_numpy(z)
    near = (z @ z.T).fill_diagonal_(-1).topk(K).indices
    return (some_truth[near] == some_truth[:, None]).float().mean(1)[which].mean().item()


everything = torch.ones(len(chosen), dtype=torch.bool)
takeaway(
    f"of the {K} nearest in the embedding {neighbours_of_own_class(before, everything):.0%} are of the same class "
    f"before training and {neighbours_of_own_class(after, everything):.0%} after it; for images that CLIP named "
    f"wrongly {neighbours_of_own_class(before, named_wrongly):.0%} and "
    f"{neighbours_of_own_class(after, named_wrongly):.0%}."
)

# %% [markdown]
# ## What else is in tclip.py?
#
# You have now met the method and its loop, the first part of the file. The rest carries data to it and results from it:
#
# * [`Config`](../tclip.py): every setting is one field, with its help and its limits; [`parse`](../tclip.py) makes the
#   command line from the fields, so that the two cannot differ.
# * [`predict`](../tclip.py), [`score`](../tclip.py), [`evaluate`](../tclip.py): what the student says, and how right it
#   is.
# * [`DATASETS`](../tclip.py), [`open_dataset`](../tclip.py) and [`Folder`](../tclip.py): where (image, label) pairs
#   come from. Labels travel along for evaluation alone.
# * [`square`](../tclip.py), [`read_images`](../tclip.py) and [`PixelFile`](../tclip.py): each image is decoded once and
#   kept as bytes at the student's size, in memory or, where there are too many, in a file. So no step of training waits
#   for a decoder.
# * [`load_clip`](../tclip.py), [`cached`](../tclip.py): teachers from several packages behind one small interface,
#   [`Teacher`](../tclip.py); and a cache of their features.
# * [`read_pseudo_labels`](../tclip.py) and [`match`](../tclip.py): the answers of any other teacher, from a file.
# * [`write_whole`](../tclip.py): each file is written as a draft and then put into place, as you saw of the checkpoint.
# * [`complete`](../tclip.py), [`run`](../tclip.py), [`main`](../tclip.py): settings filled in from the data set; the
#   whole run, which is what these notebooks did step by step; errors that you can mend, told in one line.
#
# **Take-away: the method is the smaller part of the file; the larger makes it start, stop and tell you what is wrong.**
#
# ## Exercises
#
# **1.** In `third_version`, comment out the line with `labels.record`. Does it fail, and what does it train now?
#
# <details><summary>Answer</summary>
#
# It does not fail: `end_epoch` keeps the label of every image that was not seen, and now none was. The labels stay as
# they were, and it is the second version again (up to rounding, as the table is kept with 16 bits a number).
# </details>
#
# **2.** Give both views of an image the same augmentation (make one, and use it twice). What becomes of the contrastive
# loss?
#
# <details><summary>Answer</summary>
#
# `view = tclip.augment(pixels[index], **tclip.VIEWS[config.views])`, then `views = torch.cat([view, view])`. The two
# rows are equal, so their similarity is as high as it can be from the first step on. Nothing is left to learn from
# pulling; only the pushing remains. Print the contrastive loss in the loop, with and without this change.
# </details>
#
# **3.** Add a *mean teacher*: a copy of the student whose weights follow slowly, and whose answers are recorded in
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
#     logits, z = shadow(views)
# labels.record(index.repeat(2), logits.softmax(1), z)
# ```
# It costs one more forward pass a step. You have changed the method: now measure it, with more than one seed.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
