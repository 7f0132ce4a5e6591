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
# # 1. How does CLIP name images without labels?
#
# You have images and the names of the classes, but no labels. CLIP, a network that has learned from pairs of an image
# and a caption, can guess them. Its guesses are called *pseudo-labels*. This notebook shows how they are made, in what
# way they are wrong, and what CLIP knows beyond them. The next three show how a small network learns from them all the
# same, and the fifth compares that with other ways.
#
# You need to know PyTorch; no paper has to be read first. Everything runs offline on a CPU. Most of it looks at what
# OpenAI's CLIP ViT-B/32 made of WHU-RS19, aerial images of 19 classes: vectors that the authors of RS-TransCLIP have
# published, in a small file beside this notebook ([real_answers.py](real_answers.py) made it). The images themselves
# are not in it. Where you want to *see* images, there are scikit-learn's handwritten digits, and a tiny CLIP that has
# only ever seen *printed* ones ([offline_clip.py](offline_clip.py)).
#
# In [tclip.py](../tclip.py) this is the section *Pseudo-labels*.

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
import inspect
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import (
    BLACK,
    BLUE,
    ORANGE,
    RED,
    SKY,
    gpt4v,
    real_clip,
    show_images,
    show_map,
    show_shares,
    show_source,
    takeaway,
)
from sklearn.manifold import TSNE

import tclip

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # a rough map, to test that all cells run
torch.manual_seed(0)
TEMPERATURE = inspect.signature(tclip.zero_shot_probs).parameters["temperature"].default

# %% [markdown]
# ## What is there to start from?
#
# **In short:** images without labels, the names of the classes, and a CLIP.
#
# CLIP has two halves. One turns an image into a vector, the other a text; both vectors are made length one. In its
# training CLIP saw pairs of an image and a caption, and learned to let the two vectors of a pair point the same way.
# Here are the vectors of all images (`features`), and of some texts for each class: each text is a *prompt* with the
# name of the class at its end. The true class, `truth`, is for us, to see what is right and wrong. `tclip.train` never
# sees it.

# %%
title, real = real_clip()
N, C, truth = len(real.truth), len(real.classes), real.truth
print("features", tuple(real.features.shape), f"rows of length {real.features[0].norm():.3f}")
print("texts   ", tuple(real.texts.shape), "prompts, classes, numbers of a vector")
print("classes ", ", ".join(real.classes))
print("prompts:", *real.prompts, sep="\n    ")
takeaway(f"{title}: {N} images and {C} names go in, and not one label.")

# %% [markdown]
# ## How can it name an image that nobody labelled?
#
# **In short:** it takes the class whose text points most nearly in the direction of the image.
#
# The measure is the cosine of the angle, which for vectors of length one is their dot product. Which prompt suits CLIP
# best nobody can tell without labels; so several are used. Their vectors are averaged, and the mean is made length one
# again. Each class then has one vector, and together they are the weights of a linear classifier that was *written*
# instead of trained. This is called *zero-shot* classification. Let us do it by hand and ask about one image.

# %%
by_hand = F.normalize(real.texts.mean(0), dim=1)  # (C, D), of the prompts above
alone = [tclip.score(real.features @ text.T, truth)["accuracy"] for text in real.texts]
together = tclip.score(real.features @ by_hand.T, truth)["accuracy"]

cosines = real.features @ real.mean_text.T  # (N, C); mean_text: of all prompts of RS-TransCLIP
probs = (cosines / TEMPERATURE).softmax(1)  # it comes in the next section
named = probs.argmax(1)
right = named == truth
example = (~right).nonzero()[0].item()  # the first image that CLIP names wrongly
nearest_texts = cosines[example].topk(10).indices.tolist()
best = nearest_texts[0]
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharey=True)
for ax, values, label in zip(axes, (cosines, probs), ("cosine with its text", f"softmax(cosine / {TEMPERATURE:g})")):
    colors = [RED if c == best else SKY for c in nearest_texts]
    ax.barh([real.classes[c] for c in nearest_texts], values[example, nearest_texts], color=colors)
    ax.set_xlabel(label)
axes[0].invert_yaxis()
figure.suptitle(f"an image of the class {real.classes[truth[example]]}, and the classes nearest to it")
plt.show()
first, second = cosines[example].topk(2).values.tolist()
takeaway(
    f'CLIP says "{real.classes[best]}" to this image of {real.classes[truth[example]]}: the best cosine is '
    f"{first:.3f}, the next {second:.3f}, and the softmax makes {probs[example, best]:.0%} of it. Of all images "
    f"{min(alone):.1%} to {max(alone):.1%} are named rightly by one prompt, {together:.1%} by the {len(alone)} "
    f"together, and {tclip.score(probs, truth)['accuracy']:.1%} by all prompts of RS-TransCLIP."
)

# %% [markdown]
# Two functions are all that is needed. Here they are as they run, with a link to their place in the file.

# %%
show_source(tclip.text_classifier, tclip.zero_shot_probs)
print("the same as by hand:", torch.allclose(probs, tclip.zero_shot_probs(real.features, real.mean_text)))

# %% [markdown]
# ## Why divide by a temperature?
#
# **In short:** cosines differ by little; the temperature says how much a difference means, and changes no name.
#
# A softmax of the cosines as they are would be nearly flat. Dividing by a small *temperature* first spreads them out.
# CLIP learns this number in its training; OpenAI's ended at the value that is the default of `zero_shot_probs` above.
# What would another one do?

# %%
temperatures = torch.logspace(-3, 0, 31)
confidence, share_right = [], []
for temperature in temperatures.tolist():
    p = tclip.zero_shot_probs(real.features, real.mean_text, temperature)
    confidence.append(p.amax(1).mean().item())
    share_right.append(tclip.score(p, truth)["accuracy"])

figure, ax = plt.subplots(figsize=(9, 3.6))
ax.semilogx(temperatures, confidence, color=BLUE, label="mean confidence")
ax.semilogx(temperatures, share_right, color=ORANGE, ls="--", label="share that is right")
ax.axvline(TEMPERATURE, color=BLACK, ls=":", label="CLIP's own")
ax.axhline(1 / C, color="gray", ls="-.", label="all classes alike")
ax.set(xlabel="temperature", ylabel="share", ylim=(0, 1.05))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
takeaway(
    f"from the highest temperature to the lowest CLIP sounds {confidence[-1]:.0%} to {confidence[0]:.0%} sure, and "
    f"{share_right[-1]:.1%} or {share_right[0]:.1%} are right. At its own, {TEMPERATURE:g}, it is "
    f"{probs.amax(1).mean():.0%} sure."
)

# %% [markdown]
# ## Which mistakes does it make?
#
# **In short:** some classes are mostly called by a wrong name, here with each of three teachers.
#
# Left, how many images of each class CLIP names rightly. Right, how often it says each name, beside how often it
# should.

# %%
answer = tclip.score(probs, truth)
order = torch.tensor(answer["per_class"]).argsort().tolist()
names = [real.classes[c] for c in order]
figure, (a, b) = plt.subplots(1, 2, figsize=(9, 6), sharey=True)
a.barh(names, [100 * answer["per_class"][c] for c in order], color=SKY)
a.set(xlabel="named rightly, in %")
said, there = answer["confusion"].sum(0), answer["confusion"].sum(1)
b.barh(names, said[order], color=[RED if said[c] > there[c] else SKY for c in order])
(tick,) = b.plot(there[order], range(len(order)), "|", color=BLACK, ms=14, mew=3)
b.set(xlabel="images of that name")
patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (RED, SKY)]
figure.legend([*patches, tick], ["too many", "not too many", "in truth"], loc="outside upper right", ncols=3)
plt.show()
low, high = order[0], order[-1]
most = (said - there).argmax().item()
takeaway(
    f"one accuracy, {answer['accuracy']:.1%}, hides {answer['per_class'][low]:.0%} for {real.classes[low]} and "
    f"{answer['per_class'][high]:.0%} for {real.classes[high]}. {said[most]} images are called {real.classes[most]}, "
    f"and {there[most]} are."
)

# %% [markdown]
# A *noise matrix* says, for each true class, how its images are called. Here are two of very different teachers:
# GPT-4V, a large language model that sees, of satellite images (EuroSAT; those that it refused to name are left out),
# and the tiny offline CLIP, of handwritten digits.

# %%
config = tclip.Config(**tclip.DATASETS["digits"]["settings"], device="cpu", cache="none")
digits, _, numbers = tclip.read_dataset(config)
figure, axes = plt.subplots(2, 1, figsize=(8, 12))
teachers = {"GPT-4V on EuroSAT": gpt4v(), "the offline CLIP on digits": None}
teachers["the offline CLIP on digits"] = tclip.score(digits.probs, digits.truth)["confusion"], numbers
lines = []
for ax, (name, (confusion, classes)) in zip(axes, teachers.items()):
    letters = list("0123456789") if classes is numbers else None
    show_shares(ax, confusion, classes, f"{name}, in % of each class", letters=letters)
    wrong = confusion.float().fill_diagonal_(0) / confusion.sum(1, keepdim=True)
    it, other = divmod(wrong.argmax().item(), len(classes))
    accuracy = confusion.diag().sum() / confusion.sum()
    lines.append(
        f"{name}: {accuracy:.1%} right, but {wrong[it, other]:.0%} of {classes[it]} are called {classes[other]}"
    )
plt.show()
takeaway("; ".join(lines) + ".")

# %% [markdown]
# ## What do the image features know that the names do not say?
#
# **In short:** they keep most classes apart; it is the text that points to the wrong place.
#
# Text is the weak side. A name is one vector for all that is called so, written by somebody who has not seen the
# images. The image features are the strong side: images of a class lie together, even where the class is misnamed. Here
# is a map of them. (t-SNE draws it so that neighbours stay neighbours; distances between islands mean little, the axes
# nothing.) An image is a dot; where there is room a letter says its class: first the true one, then CLIP's name, then
# the label that tclip makes of both before any training ([notebook 3](03_ensemble_labels.ipynb) shows how). Wrong ones
# are orange crosses and letters.

# %% tags=["picture"]
torch.manual_seed(0)
labels = tclip.EnsembleLabels(probs, real.features).targets(slice(None))  # (N, C)
points = TSNE(perplexity=30, init="pca", random_state=0, max_iter=300 if QUICK else 750).fit_transform(real.features)
letters = [chr(ord("A") + c) for c in range(C)]
figure, axes = plt.subplots(2, 2, figsize=(9, 9))
panels = {"the truth": truth, "CLIP's names": named, "tclip's labels": labels.argmax(1)}
for ax, (name, given) in zip(axes.flat[[0, 2, 3]], panels.items()):
    wrong = given != truth
    caption = name if name == "the truth" else f"{name}: {(~wrong).float().mean():.1%} right"
    show_map(ax, points, [letters[c] for c in given], wrong.numpy(), caption)
axes[0, 1].axis("off")
lines = [f"{letter}  {name}" for letter, name in zip(letters, real.classes)]
for x, column in (0, lines[: -(-C // 2)]), (0.55, lines[-(-C // 2) :]):
    axes[0, 1].text(x, 0.95, "\n".join(column), va="top", linespacing=1.4)
plt.show()
nearest = tclip.nearest(real.features, 1)[:, 0]
same = truth[nearest] == truth
takeaway(
    f"the nearest other image is of the same class for {same.float().mean():.1%} of all images, and for "
    f"{same[~right].float().mean():.1%} of those that CLIP names wrongly. The names are right for "
    f"{right.float().mean():.1%}."
)

# %% [markdown]
# ## Are the errors random?
#
# **In short:** no; images that look alike are misnamed together, and a vote of neighbours mends fewer of them.
#
# Much of the literature on noisy labels assumes chance: every image of a class has the same chance of being called by a
# wrong name. Then the errors of similar images would have nothing to do with each other, and a look at the neighbours
# would mend them. We can make it so: shuffle CLIP's names among the images *of the same true class*. The noise matrix
# stays exactly the same; only where the errors lie changes. Then let both kinds of labels be corrected in the simplest
# way: each image takes the name that most of its neighbours have. Count only the classes that are named rightly more
# often than not: where most names of a class are wrong a vote has nothing to stand on, shuffled or not.

# %%
shuffled = named.clone()
for c in range(C):
    members = (truth == c).nonzero()[:, 0]
    shuffled[members] = named[members[torch.randperm(len(members))]]
near = tclip.nearest(real.features, tclip.Config.label_neighbours)  # (N, k)
counted = torch.tensor([share > 0.5 for share in answer["per_class"]])[truth]  # (N,) bool
outcome = {}
for name, given in (("the same noise, shuffled", shuffled), ("CLIP's own noise", named)):
    vote = F.one_hot(given[near], C).sum(1).argmax(1)
    outcome[name] = [(some != truth)[counted].float().mean().item() for some in (given, vote)]
figure, ax = plt.subplots(figsize=(9, 3.4))
for i, values in enumerate(outcome.values()):
    bars = ax.bar([i - 0.2, i + 0.2], [100 * v for v in values], width=0.38, color=[SKY, BLUE])
    ax.bar_label(bars, fmt="%.1f")
ax.set_xticks(range(2), outcome)
ax.set_ylabel("wrong labels, in %")
patches = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (SKY, BLUE)]
ax.legend(patches, ["before", "after the\nneighbours' vote"], loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
(start, shuffled_end), (_, own_end) = outcome.values()
takeaway(
    f"of {start:.1%} wrong labels the vote leaves {shuffled_end:.1%} if the errors are shuffled, and {own_end:.1%} if "
    "they are CLIP's own."
)

# %% [markdown]
# On the digits one can see such an error. One by one those that are called by the wrong name are hard to tell from the
# others of their class; their *mean* shows what they have in common.

# %%
confusion, digit = teachers["the offline CLIP on digits"][0], digits.probs.argmax(1)
wrong = confusion.float().fill_diagonal_(0) / confusion.sum(1, keepdim=True)
worst, favourite = divmod(wrong.argmax().item(), len(numbers))
pairs = (worst, worst), (worst, favourite), (favourite, favourite)
means = torch.stack([digits.pixels[(digits.truth == t) & (digit == n)].float().mean(0) / 255 for t, n in pairs])
show_images(means, [f"{numbers[t]}, called {numbers[n]}" for t, n in pairs], columns=3, side=2.4)
plt.show()
takeaway(
    "errors that follow from how an image looks can be learned like any other concept: a student that imitates its "
    "teacher will imitate its mistakes. What can help is what the teacher did not use: which images are alike."
)

# %% [markdown]
# ## Does CLIP know when it is wrong?
#
# **In short:** quite well; but keeping only its confident names loses the classes that need help.
#
# The *reliability diagram* sorts images by confidence into bins and compares it, bin by bin, with how many are right.
# On the diagonal, confidence means what it says. The mean distance from it, over all images, is called the *expected
# calibration error*.

# %%
confident = probs.amax(1)
BINS = 10
edges = torch.linspace(0, 1, BINS + 1)
bins = torch.bucketize(confident, edges[1:-1])
filled = [b for b in range(BINS) if (bins == b).any()]
centre = [confident[bins == b].mean().item() for b in filled]
height = [right[bins == b].float().mean().item() for b in filled]
figure, (a, b) = plt.subplots(1, 2, figsize=(9, 4))
a.plot([0, 1], [0, 1], color="gray", ls=":", label="perfectly calibrated")
a.plot(centre, height, "o-", color=BLUE, label="CLIP")
a.set(xlabel="mean confidence in the bin", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
a.legend(loc="lower right")
b.hist([confident[right].numpy(), confident[~right].numpy()], edges.numpy(), stacked=True, color=[SKY, RED],
       label=["right", "wrong"])  # fmt: skip
b.set(xlabel="confidence", ylabel="images")
b.legend(loc="upper left")
plt.show()
sizes = torch.bincount(bins, minlength=BINS)[filled] / N
gap = sum(s * abs(c - h) for s, c, h in zip(sizes.tolist(), centre, height))
half, of_worst = confident.argsort(descending=True)[: N // 2], truth == low
takeaway(
    f"CLIP is {confident.mean():.0%} sure on average, and {right.float().mean():.0%} right: an expected calibration "
    f"error of {100 * gap:.0f} points. In the more confident half {right[half].float().mean():.0%} are right, but of "
    f"{of_worst.sum()} images of {real.classes[low]} it holds {(right & of_worst)[half].sum()} with the right name."
)

# %% [markdown]
# ## Exercises
#
# **1.** Ask the offline CLIP with the numerals "0", "1", ... for class names instead of words. Is it the same class
# that is worst?
#
# <details><summary>Answer</summary>
#
# ```python
# clip = tclip.Clip("offline")
# numerals = tclip.text_classifier(clip.encode_texts, list("0123456789"), tclip.DATASETS["digits"]["templates"])
# answer = tclip.score(tclip.zero_shot_probs(digits.features, numerals, clip.temperature), digits.truth)
# print(answer["accuracy"], dict(zip(numbers, answer["per_class"])))
# ```
# It is the same class. The name of a class is a setting like any other; this CLIP has met both kinds, about equally
# often, while a CLIP from the web may know one of two names far better.
# </details>
#
# **2.** Find the temperature at which the mean confidence equals the share of right names. Would labels at that
# temperature be better for training?
#
# <details><summary>Answer</summary>
#
# Read it off the picture of the temperatures: it is where the two lines cross, below CLIP's own, which is too modest
# here. The names stay the same, so no error goes away, and wrong names would be believed more. Note that you needed the
# truth to find it.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
