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
# [![Open in Colab][badge]][colab]
#
# You have images and the names of the classes, but no labels. CLIP, a network that has learned from pairs of an image
# and a caption, can guess them. Its guesses are called *pseudo-labels*. This notebook shows how they are made and in
# what way they are wrong. The next three show how a small network learns from them all the same, and the fifth compares
# that with other ways.
#
# You need to know PyTorch; no paper has to be read first. Everything runs offline on a CPU, on scikit-learn's
# handwritten digits. The CLIP used here is a tiny one that has only ever seen *printed* digits (see
# [offline_clip.py](offline_clip.py)), so that handwriting confuses it, as unfamiliar images confuse its big sisters.
#
# In [tclip.py](../tclip.py) this is the section *Pseudo-labels*; the class `Clip` is in the section *CLIP*.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/01_pseudo_labels.ipynb

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

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, ORANGE, RED, SKY, real_clip, show_images, show_shares, show_source, takeaway
from sklearn.neighbors import KNeighborsClassifier

import tclip

started = time.time()
torch.manual_seed(0)
RECIPE = tclip.DATASETS["digits"]  # what tclip knows of this data set: class names, prompts, settings

# %% [markdown]
# ## What is there to start from?
#
# Images without labels, the names of the classes, and CLIP. `load_images` reads each image once: as pixels for the
# student, the network that we shall train, and as CLIP's features. It brings the true labels too, `images.truth`. We
# look at them to see what is right and wrong. `tclip.train` never does.

# %%
clip = tclip.Clip("offline")
config = tclip.Config(**RECIPE["settings"], cache="none")
images, classes = tclip.load_images(config, "train", clip), RECIPE["classes"]
N, C = len(images.pixels), len(classes)
print("pixels  ", tuple(images.pixels.shape), images.pixels.dtype)
print("features", tuple(images.features.shape), f"rows of length {images.features[0].norm():.3f}")
print("classes ", ", ".join(classes))
show_images(images.pixels[:30], columns=15, side=0.6)
plt.show()
takeaway(f"{N} images and {C} names go in, and not one label.")

# %% [markdown]
# ## How can it name an image that nobody labelled?
#
# CLIP has two halves. One turns an image into a vector, the other a text, and both vectors have length one. In its
# training CLIP saw pairs of an image and a caption, and learned to let the two vectors of a pair point the same way. So
# write a caption for each class, a *prompt*, and see which of them points most nearly in the direction of the image.
# The measure is the cosine of the angle, which for vectors of length one is their dot product.
#
# Which wording suits CLIP best nobody can tell without labels; so several are used. Their vectors are averaged, and the
# mean is made length one again. That is all of [`text_classifier`](../tclip.py). Here it is by hand, for one class.

# %%
print("prompts:", *RECIPE["templates"], sep="\n    ")
seven = classes.index("seven")
vectors = clip.encode_texts([prompt.replace("{}", "seven") for prompt in RECIPE["templates"]])  # (prompts, D)
by_hand = F.normalize(vectors.mean(0), dim=0)  # (D,)

prompts = tclip.text_classifier(clip.encode_texts, classes, RECIPE["templates"])  # (C, D): the same for every class
print("equal to text_classifier:", torch.allclose(by_hand, prompts[seven]))

# %% [markdown]
# Each row of `prompts` is now the weight vector of a class, in a linear classifier that was written instead of trained.
# This is called *zero-shot* classification. Let us ask it about one image.

# %%
probs = tclip.zero_shot_probs(images.features, prompts, clip.temperature)  # (N, C)
cosines = images.features @ prompts.T  # (N, C)
named = probs.argmax(1)
right = named == images.truth
example = (~right).nonzero()[0].item()  # the first image that CLIP names wrongly

figure, (left, middle, last) = plt.subplots(1, 3, figsize=(10, 2.9), width_ratios=[1, 2, 2])
left.imshow(images.pixels[example].permute(1, 2, 0))
left.axis("off")
left.set_title(f"it is a {classes[images.truth[example]]}")
for ax, values, label in ((middle, cosines, "cosine with the prompts"), (last, probs, "softmax(cosine / temperature)")):
    best = values[example].argmax().item()
    ax.bar(classes, values[example], color=[RED if c == best else SKY for c in range(C)])
    ax.tick_params("x", rotation=60)
    ax.set_ylabel(label)
plt.show()
first, second = cosines[example].topk(2).values.tolist()
takeaway(
    f'CLIP says "{classes[best]}" to this {classes[images.truth[example]]}: the best cosine is {first:.3f}, the next '
    f"{second:.3f}, and the softmax makes {probs[example, best]:.0%} of it."
)

# %% [markdown]
# Two functions are all that is needed, and you have now met each of their lines, but for the temperature, which comes
# next. Here they are as they run, with a link to their place in the file.

# %%
show_source(tclip.text_classifier, tclip.zero_shot_probs)

# %% [markdown]
# ## Why divide by a temperature?
#
# Cosines differ by little, and a softmax of them as they are would be nearly flat. Dividing by a small *temperature*
# first spreads them out. CLIP learns this number in its training; `Clip` reads it from the model. What would another
# one do?

# %%
temperatures = torch.logspace(-3, 0, 31)
confidence, share_right = [], []
for temperature in temperatures.tolist():
    p = tclip.zero_shot_probs(images.features, prompts, temperature)
    confidence.append(p.amax(1).mean().item())
    share_right.append(tclip.score(p, images.truth)["accuracy"])

figure, ax = plt.subplots(figsize=(6, 2.8))
ax.semilogx(temperatures, confidence, color=BLUE, label="mean confidence")
ax.semilogx(temperatures, share_right, color=ORANGE, ls="--", label="share that is right")
ax.axvline(clip.temperature, color=BLACK, lw=1, ls=":", label="this CLIP's own")
ax.axhline(1 / C, color="gray", lw=1, label="all classes alike")
ax.set(xlabel="temperature", ylabel="share", ylim=(0, 1.05))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
takeaway(
    f"the temperature changes how sure CLIP sounds (from {confidence[-1]:.0%} to {confidence[0]:.0%} here), never "
    f"which name comes first: {share_right[0]:.1%} are right at the lowest and {share_right[-1]:.1%} at the highest."
)

# %% [markdown]
# ## Which mistakes does it make?
#
# One accuracy hides the interesting part. The *noise matrix* says, for each true class, how its images are called.

# %%
by_teacher = tclip.score(probs, images.truth)
figure, ax = plt.subplots(figsize=(5.6, 4.8))
picture = show_shares(ax, by_teacher["confusion"], classes, "CLIP's names, in % of each class")
figure.colorbar(picture, label="% of the class", shrink=0.8)
plt.show()

per_class = torch.tensor(by_teacher["per_class"])
worst, best_class = per_class.argmin().item(), per_class.argmax().item()
wrong_names = by_teacher["confusion"].float().fill_diagonal_(0)
favourite = wrong_names[worst].argmax().item()
share = wrong_names[worst, favourite] / by_teacher["confusion"][worst].sum()
takeaway(
    f"CLIP is {by_teacher['accuracy']:.0%} right, but {per_class[best_class]:.0%} for {classes[best_class]} and "
    f"{per_class[worst]:.0%} for {classes[worst]}, which it calls {classes[favourite]} in {share:.0%} of all cases."
)

# %% [markdown]
# ## Are the errors random?
#
# Much of the literature on noisy labels assumes that they are: every seven has the same chance of being called three,
# as if somebody had thrown dice. Then the errors of similar images would have nothing to do with each other, and a look
# at the neighbours would mend them.
#
# We can make such dice: shuffle CLIP's names among the images *of the same true class*. The noise matrix stays exactly
# the same; only where the errors lie changes. Then let both kinds of labels be corrected in the simplest way: each
# image takes the name that most of the images around it have (here the nearest in the plain pixels). Where most images
# of a class are called by one wrong name a vote must fail, diced or not. So count only the classes that CLIP names
# rightly more often than not.

# %%
diced = named.clone()
for c in range(C):
    members = (images.truth == c).nonzero()[:, 0]
    diced[members] = named[members[torch.randperm(len(members))]]

pixels = images.pixels[:, 0].flatten(1).numpy() / 255  # grey: one channel is enough
counted = (per_class > 0.5)[images.truth]  # (N,) bool
outcome = {}
for name, labels in (("the same noise, diced", diced), ("CLIP's own noise", named)):
    vote = torch.from_numpy(KNeighborsClassifier(21).fit(pixels, labels).predict(pixels))
    outcome[name] = [(some != images.truth)[counted].float().mean().item() for some in (labels, vote)]

figure, ax = plt.subplots(figsize=(6, 2.6))
for i, values in enumerate(outcome.values()):
    bars = ax.bar([i - 0.2, i + 0.2], [100 * v for v in values], width=0.38, color=[SKY, BLUE])
    ax.bar_label(bars, fmt="%.1f")
ax.set_xticks(range(2), outcome)
ax.set_ylabel("wrong labels, in %")
patches = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (SKY, BLUE)]
ax.legend(patches, ["before", "after the neighbours' vote"], loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
(start, dice_end), (_, own_end) = outcome.values()
takeaway(
    f"of {start:.1%} wrong labels the neighbours' vote leaves {dice_end:.1%} if the errors are diced, and "
    f"{own_end:.1%} if they are CLIP's own: its errors lie in the images, and images that look alike are wrong "
    f"together."
)

# %% [markdown]
# See for yourself: what do the wrongly named images of the worst class have in common? One by one they are hard to tell
# apart; it shows in their *mean*. Here is the mean of those that CLIP names rightly, of those that it calls by its
# favourite wrong name, and of the class whose name they have been given.

# %%
groups = [(images.truth == t) & (named == n) for t, n in ((worst, worst), (worst, favourite), (favourite, favourite))]
means = torch.stack([images.pixels[group].float().mean(0) / 255 for group in groups])
it, other = classes[worst], classes[favourite]
show_images(means, [f"{it}, called {it}", f"{it}, called {other}", f"{other}, called {other}"], columns=3, side=1.7)
plt.show()

# %% [markdown]
# A network that is trained on diced errors has to learn them image by image, by heart, against all that it sees. Errors
# that follow from how an image looks can be learned like any other concept: "a seven with a bar through its middle is
# called three" is as good a rule as "a ring is called zero". So a student that simply imitates its teacher will imitate
# its mistakes. What can help is something that the teacher did not use: the many images themselves, and which of them
# are alike. Notebooks [2](02_class_conditional_contrast.ipynb) and [3](03_ensemble_labels.ipynb) are about that.
#
# ## Does CLIP know when it is wrong?
#
# If it did, one could keep its confident names and drop the others. The *reliability diagram* sorts images by
# confidence into bins and compares it, bin by bin, with how many are right. On the diagonal, confidence means what it
# says. The mean distance from it, over all images, is called the *expected calibration error*.

# %% tags=["picture"]
confident = probs.amax(1)
edges = torch.linspace(0, 1, 11)
bins = torch.bucketize(confident, edges[1:-1])
filled = [b for b in range(10) if (bins == b).any()]
centre = [confident[bins == b].mean().item() for b in filled]
height = [right[bins == b].float().mean().item() for b in filled]

figure, (a, b) = plt.subplots(1, 2, figsize=(9, 3.4))
a.plot([0, 1], [0, 1], color="gray", ls=":", label="perfectly calibrated")
a.plot(centre, height, "o-", color=BLUE, label="CLIP")
a.set(xlabel="mean confidence in the bin", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
a.legend(loc="upper left")
b.hist([confident[right].numpy(), confident[~right].numpy()], edges.numpy(), stacked=True, color=[SKY, RED],
       label=["right", "wrong"])  # fmt: skip
b.set(xlabel="confidence", ylabel="images")
b.legend(loc="upper left")
plt.show()
sizes = torch.bincount(bins, minlength=10)[filled] / N
gap = sum(s * abs(c - h) for s, c, h in zip(sizes.tolist(), centre, height))
half, of_worst = confident.argsort(descending=True)[: N // 2], images.truth == worst
takeaway(
    f"CLIP is {confident.mean():.0%} sure on average, and {right.float().mean():.0%} right: an expected calibration "
    f"error of {100 * gap:.0f} points. In the more confident half {right[half].float().mean():.0%} are right, but of "
    f"{of_worst.sum()} images of {classes[worst]} it holds {(right & of_worst)[half].sum()} with the right name: "
    "selecting cleans the labels, at the cost of the class that needs help most."
)

# %% [markdown]
# ## And a real CLIP?
#
# The code does not change: the same two calls, with longer lists of prompts. Here are features that OpenAI's CLIP
# ViT-B/32 made of WHU-RS19, aerial images of 19 classes, which others have published. (They are read where the file
# lies in the folder `data`; [whurs19.py](benchmark/whurs19.py) says where to find it. Elsewhere you see the digits
# again.) Left, how often it is right, by class. Right, how often it says each name, beside how often it should.

# %%
title, real = real_clip()
print(f"{title}: {len(real.names)} images")
answer = tclip.score(real.probs, real.truth)
order = torch.tensor(answer["per_class"]).argsort().tolist()
names = [real.classes[c] for c in order]
figure, (a, b) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
a.barh(names, [100 * answer["per_class"][c] for c in order], color=SKY)
a.set(xlabel="named rightly, in %", title=title)
said, there = answer["confusion"].sum(0), answer["confusion"].sum(1)
b.barh(names, said[order], color=[RED if said[c] > there[c] else SKY for c in order])
b.plot(there[order], range(len(order)), "|", color=BLACK, ms=9, mew=2)
b.set(xlabel="images of that name (red: too many), and in truth (black)")
plt.show()
K = 10
near = (real.features @ real.features.T).fill_diagonal_(-1).topk(K).indices  # (N, K)
wrong = real.probs.argmax(1) != real.truth
alike = wrong[near][wrong].float().mean()
same_class = (real.truth[near] == real.truth[:, None])[wrong].float().mean()
low, high = min(answer["per_class"]), max(answer["per_class"])
takeaway(
    f"{title}: {answer['accuracy']:.1%} right, by class from {low:.0%} to {high:.0%}. Of the {K} nearest of a wrongly "
    f"named image {alike:.0%} are named wrongly too (of all images {wrong.float().mean():.0%}), and yet "
    f"{same_class:.0%} are of its true class: the features know what the names do not say."
)

# %% [markdown]
# ## Exercises
#
# **1.** Ask CLIP with the numerals "0", "1", ... for class names instead of words. Is it the same class that is worst?
#
# <details><summary>Answer</summary>
#
# ```python
# numerals = tclip.text_classifier(clip.encode_texts, list("0123456789"), RECIPE["templates"])
# answer = tclip.score(tclip.zero_shot_probs(images.features, numerals, clip.temperature), images.truth)
# print(answer["accuracy"], dict(zip(classes, answer["per_class"])))
# ```
# The name of a class is a setting like any other. This CLIP has met both kinds, about equally often; a CLIP from the
# web may know one of two names far better.
# </details>
#
# **2.** Invent a prompt for the offline CLIP, say "a sketch of a {}." What happens, and why is that better than an
# answer?
#
# <details><summary>Answer</summary>
#
# `tclip.text_classifier(clip.encode_texts, classes, ["a sketch of a {}."])` raises a `UserError`: the tiny CLIP never
# met the word "sketch". Its vector would be all zeros, and the prompt would silently mean something else. "a drawing of
# a {}." is among the captions that it knows.
# </details>
#
# **3.** Find the temperature at which the mean confidence equals the share of right names. Would labels at that
# temperature be better for training?
#
# <details><summary>Answer</summary>
#
# Read it off the picture above: it is where the two lines cross. The names stay the same, so no error goes away; but
# targets that are less sure pull less on the student where CLIP is unsure. Note that you needed the truth to find it.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
