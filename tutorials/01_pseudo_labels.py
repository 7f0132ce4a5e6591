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
# In [tclip.py](../tclip.py) this is the section *Pseudo-labels* (`text_classifier`, `zero_shot_probs`); `load_clip` is
# in the section *Teachers*, `balance` in *Ensemble labels*.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/01_pseudo_labels.ipynb

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
import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, GREEN, ORANGE, RED, SKY, show_images, show_shares, show_source, takeaway
from sklearn.neighbors import KNeighborsClassifier

started = time.time()
torch.manual_seed(0)
RECIPE = tclip.DATASETS["digits"]  # what tclip knows of this data set: where it comes from, class names, prompts

# %% [markdown]
# ## What is there to start from?
#
# Images without labels, the names of the classes, and CLIP. `load_images` reads each image once: as pixels for the
# student, the network that we shall train, and as CLIP's features. It brings the true labels too, `images.truth`. We
# look at them to see what is right and wrong. `tclip.train` never does.

# %%
teacher = tclip.load_clip("offline")
images = tclip.load_images("digits", teacher=teacher)
N, C = len(images.pixels), len(images.classes)
print("pixels  ", tuple(images.pixels.shape), images.pixels.dtype)
length = images.features[0].norm()
print("features", tuple(images.features.shape), images.features.dtype, f"rows of length {length:.3f}")
print("classes ", ", ".join(images.classes))
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
# One caption is a matter of luck; so several are used. Their vectors are averaged, and the mean is made length one
# again. That is all of [`text_classifier`](../tclip.py). Here it is by hand, for one class.

# %%
print("prompts:", *RECIPE.templates, sep="\n    ")
seven = images.classes.index("seven")
captions = [template.replace("{}", "seven") for template in RECIPE.templates]
vectors = teacher.encode_texts(captions)  # (prompts, D), rows of length one
by_hand = F.normalize(vectors.mean(0), dim=0)  # (D,)

prompts = tclip.text_classifier(teacher, images.classes, RECIPE.templates)  # (C, D): the same for every class
print("equal to text_classifier:", torch.allclose(by_hand, prompts[seven]))

# %% [markdown]
# Each row of `prompts` is now the weight vector of a class, in a linear classifier that was written instead of trained.
# This is called *zero-shot* classification. Let us ask it about one image.

# %%
probs = tclip.zero_shot_probs(images.features, prompts)  # (N, C)
cosines = images.features @ prompts.T  # (N, C)
right = probs.argmax(1) == images.truth
example = (~right).nonzero()[0].item()  # the first image that CLIP names wrongly

figure, (left, middle, last) = plt.subplots(1, 3, figsize=(10, 2.9), width_ratios=[1, 2, 2])
left.imshow(images.pixels[example].permute(1, 2, 0))
left.axis("off")
left.set_title(f"it is a {images.classes[images.truth[example]]}")
for ax, values, label in ((middle, cosines, "cosine with the prompts"), (last, probs, "softmax(cosine / temperature)")):
    best = values[example].argmax().item()
    ax.bar(images.classes, values[example], color=[RED if c == best else SKY for c in range(C)])
    ax.tick_params("x", rotation=60)
    ax.set_ylabel(label)
plt.show()
first, second = cosines[example].topk(2).values.tolist()
takeaway(
    f'CLIP says "{images.classes[best]}" to this {images.classes[images.truth[example]]}: the best cosine is '
    f"{first:.3f}, the next {second:.3f}, and the softmax makes {probs[example, best]:.0%} of it."
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
# first spreads them out. CLIP learns this number in its training; `zero_shot_probs` uses the value at which OpenAI's
# models ended (and our tiny one was led to the same). What would another one do?

# %%
temperatures = torch.logspace(-3, 0, 31)
confidence, share_right = [], []
for temperature in temperatures.tolist():
    p = tclip.zero_shot_probs(images.features, prompts, temperature)
    confidence.append(p.max(1).values.mean().item())
    share_right.append(tclip.score(p, images.truth)["accuracy"])

figure, ax = plt.subplots(figsize=(6, 3))
ax.semilogx(temperatures, confidence, color=BLUE, label="mean confidence")
ax.semilogx(temperatures, share_right, color=ORANGE, ls="--", label="share that is right")
ax.axvline(0.01, color=BLACK, lw=1, ls=":", label="the default of zero_shot_probs")
ax.axhline(1 / C, color="gray", lw=1, label="all classes alike")
ax.set(xlabel="temperature", ylabel="share", ylim=(0, 1.05))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
print(f"the cosine of an image with its best name is {cosines.max(1).values.mean():.2f} on average,")
print(f"with the second best {cosines.topk(2).values[:, 1].mean():.2f}")
takeaway(
    f"the temperature changes how sure CLIP sounds (from {confidence[-1]:.0%} to {confidence[0]:.0%} here), never "
    f"which name comes first: {share_right[0]:.1%} are right at the lowest and {share_right[-1]:.1%} at the highest."
)

# %% [markdown]
# ## Do several prompts help?
#
# A CLIP that was trained on captions from the web is choosy about wording, and without labels you cannot measure which
# prompt is best. The mean of several is the cautious choice. Our tiny CLIP was trained on a short list of captions,
# these among them, each as often as the others: how much does it care? (Dark: prompts that tclip uses. Light: others
# that the tiny CLIP knows.)

# %%
single = {t: [t] for t in RECIPE.templates + ("a {}.", "a drawing of a {}.", "a blurry photo of the digit {}.")}
single["all of tclip's, averaged"] = RECIPE.templates
accuracies = {}
for name, templates in single.items():
    weights = tclip.text_classifier(teacher, images.classes, templates)
    accuracies[name] = tclip.score(tclip.zero_shot_probs(images.features, weights), images.truth)["accuracy"]

figure, ax = plt.subplots(figsize=(7, 2.6))
colors = [BLUE if t in RECIPE.templates else ORANGE if t.startswith("all") else SKY for t in accuracies]
bars = ax.barh(list(accuracies), [100 * a for a in accuracies.values()], color=colors)
ax.bar_label(bars, fmt=" %.1f")
ax.invert_yaxis()
ax.set(xlabel="images named rightly, in %", xlim=(0, 100))
plt.show()
*ones, together = accuracies.values()
takeaway(
    f"alone, a prompt gives from {min(ones):.1%} to {max(ones):.1%} here; the mean of tclip's {len(RECIPE.templates)} "
    f"gives {together:.1%}. A CLIP that met all captions equally often does not care. For one that does, the mean "
    "takes the choice off your hands."
)

# %% [markdown]
# ## Which mistakes does it make?
#
# One accuracy hides the interesting part. The *noise matrix* says, for each true class, how its images are called.

# %%
by_teacher = tclip.score(probs, images.truth)
figure, ax = plt.subplots(figsize=(5.6, 4.8))
picture = show_shares(ax, by_teacher["confusion"], images.classes, "CLIP's names, in % of each class")
figure.colorbar(picture, label="% of the class", shrink=0.8)
plt.show()

per_class = torch.tensor(by_teacher["per_class"])
worst, best_class = per_class.argmin().item(), per_class.argmax().item()
wrong_names = by_teacher["confusion"].float().fill_diagonal_(0)
share = wrong_names[worst].max().item() / by_teacher["confusion"][worst].sum().item()
takeaway(
    f"CLIP is {by_teacher['accuracy']:.0%} right, but {per_class[best_class]:.0%} for {images.classes[best_class]} and "
    f"{per_class[worst]:.0%} for {images.classes[worst]}, which it calls {images.classes[wrong_names[worst].argmax()]} "
    f"in {share:.0%} of all cases."
)

# %% [markdown]
# ## Are the errors random?
#
# Much of the literature on noisy labels assumes that they are: every seven has the same chance of being called three,
# as if somebody had thrown dice. Then the errors of similar images would have nothing to do with each other, and a look
# at the neighbours would mend them.
#
# We can make such dice: shuffle CLIP's names among the images *of the same true class*. The noise matrix stays exactly
# the same, and so does the number of errors. Only where they lie changes. Then let both kinds of labels be corrected in
# the simplest way: each image takes the name that most of the images around it have (here the nearest in the plain
# pixels). Where most images of a class are called by one wrong name a vote must fail, diced or not. So count only the
# classes that CLIP names rightly more often than not.

# %%
named = probs.argmax(1)
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

figure, ax = plt.subplots(figsize=(6, 2.8))
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
# ## What do the wrongly named ones have in common?
#
# See for yourself: here are images of the worst class, first some that CLIP names rightly, then some that it calls by
# its favourite wrong name.

# %%
favourite = wrong_names[worst].argmax().item()
of_worst = images.truth == worst  # (N,) bool
rightly, wrongly = ((of_worst & (named == c)).nonzero()[:, 0] for c in (worst, favourite))
for group, c, color in ((rightly, worst, BLUE), (wrongly, favourite, RED)):
    some = group[:12]
    show_images(images.pixels[some], [images.classes[c]] * len(some), columns=12, colors=[color] * len(some), side=0.75)
    plt.show()

# %% [markdown]
# One by one they are hard to tell apart. What a group has in common shows in its *mean*: here is that of both groups,
# and beside them that of the class whose name the second has been given.

# %%
typical = ((images.truth == favourite) & (named == favourite)).nonzero()[:, 0]
means = torch.stack([images.pixels[group].float().mean(0) / 255 for group in (rightly, wrongly, typical)])
it, other = images.classes[worst], images.classes[favourite]
show_images(means, [f"{it}, called {it}", f"{it}, called {other}", f"{other}, called {other}"], columns=3, side=1.7)
plt.show()

K = 10
alike = torch.from_numpy(pixels)[of_worst]  # the images of the worst class, by their pixels
nearest = torch.cdist(alike, alike).fill_diagonal_(torch.inf).topk(K, largest=False).indices  # without the image itself
so_called = (named == favourite)[of_worst]
around, overall = so_called[nearest][so_called].float().mean(), so_called.float().mean()
takeaway(
    f"of the {K} images of {it} that look most like one which is called {other}, {around:.0%} are called {other} too; "
    f"of all images of {it} it is {overall:.0%}. The error has a reason, and it can be seen."
)

# %% [markdown]
# ## Why does that hurt more than chance?
#
# A network that is trained on diced errors has to learn them image by image, by heart, against all that it sees. Errors
# that follow from how an image looks can be learned like any other concept: "a seven with a bar through its middle is
# called three" is as good a rule as "a ring is called zero". So a student that simply imitates its teacher will imitate
# its mistakes. What can help is something that the teacher did not use: the many images themselves, and which of them
# are alike. Notebooks
# [2](02_class_conditional_contrast.ipynb) and [3](03_ensemble_labels.ipynb) are about that.
#
# **Take-away: errors that follow from the image are learned along with everything else.**
#
# ## Does CLIP know when it is wrong?
#
# If it did, one could keep its confident names and drop the others. The *reliability diagram* sorts images by
# confidence into bins and compares it, bin by bin, with how many are right. On the diagonal, confidence means what it
# says. The mean distance from it, over all images, is called the *expected calibration error*.

# %%
confident = probs.max(1).values
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
limit = 0.9
takeaway(
    f"CLIP is {confident.mean():.0%} sure on average, and {right.float().mean():.0%} right: an expected calibration "
    f"error of {100 * gap:.0f} points. Of the names it gives with more than {limit:.0%} confidence "
    f"{(~right)[confident > limit].float().mean():.0%} are wrong."
)

# %% [markdown]
# ## Can we just keep the confident ones?
#
# Keep only the most confident names, more or fewer of them. How many of those kept are right? And of the images of one
# class, how many are kept with their right name?

# %%
order = confident.argsort(descending=True)
kept = torch.linspace(0.05, 1, 39)
figure, ax = plt.subplots(figsize=(7, 3))
ax.plot(
    100 * kept,
    [100 * right[order[: int(k * N)]].float().mean() for k in kept],
    color=BLUE,
    label="right among the kept",
)
for c, color, line in ((best_class, GREEN, "--"), (worst, RED, ":")):
    found = (right & (images.truth == c))[order].cumsum(0) / (images.truth == c).sum()
    label = f"of {images.classes[c]}: kept, with the right name"
    ax.plot(100 * kept, [100 * found[int(k * N) - 1] for k in kept], color=color, ls=line, lw=2, label=label)
ax.set(xlabel="images kept, the most confident first, in %", ylabel="share, in %", ylim=(0, 102))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
half = order[: N // 2]
takeaway(
    f"in the more confident half {right[half].float().mean():.0%} are right, but of {of_worst.sum()} images of "
    f"{images.classes[worst]} it holds {(right & of_worst)[half].sum()} with the right name. Selecting cleans "
    "the labels, at the cost of the class that needs help most."
)

# %% [markdown]
# ## What do the sizes of the classes give away?
#
# If you know that all classes are about equally frequent, you can tell without any label that something is wrong: count
# the names. [`balance`](../tclip.py) finds the soft labels nearest to CLIP's (in the sense of relative entropy) in
# which each class gets (nearly) its equal share. On the digits, and on other data sets of the table `DATASETS` that are
# about even, tclip starts from those (`--class-prior uniform`); for a folder of your own it does so only if you say so.
# It is a prior, and only helps where it is about true.
#
# Each class has one weight, at first one. All rows are multiplied by the weights and made to sum to one again. A class
# that then has too little in all gets a larger weight, one that has too much a smaller, and so on, some times over.
# Where CLIP is sure of a name the row hardly changes; where it hesitates, the class that lacks images wins.

# %%
show_source(tclip.balance)
for iterations in (0, 1, 5, 20):
    sizes = tclip.balance(probs, iterations).sum(0)  # (C,)
    print(f"{iterations:2} iterations: the classes have from {sizes.min():.0f} to {sizes.max():.0f} of {N} images")

# %%
balanced = tclip.balance(probs)
figure, ax = plt.subplots(figsize=(8, 2.8))
width, places = 0.27, torch.arange(C)
for shift, (name, labels, color) in enumerate(
    (("in truth", images.truth, BLACK), ("by CLIP", named, ORANGE), ("balanced", balanced.argmax(1), GREEN))
):
    ax.bar(places + (shift - 1) * width, labels.bincount(minlength=C), width, color=color, label=name)
ax.set_xticks(range(C), images.classes)
ax.set_ylabel("images of that name")
ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
plt.show()
after = tclip.score(balanced, images.truth)
takeaway(
    f"balancing alone turns {by_teacher['accuracy']:.1%} into {after['accuracy']:.1%} right labels, and "
    f"{per_class[worst]:.0%} into {after['per_class'][worst]:.0%} for {images.classes[worst]}."
)

# %% [markdown]
# ## What changes for ViT-B/32 on CIFAR-10?
#
# The code does not: `text_classifier` and `zero_shot_probs` are the same, the prompts and the class names are read from
# the table `DATASETS`. But
#
# * CLIP's image half is a large transformer, so that naming the images is slow on a CPU: use a GPU. It happens once, as
#   `python tclip.py` keeps the features in a cache.
# * Each image is prepared twice: enlarged for CLIP, and at its own small size for the student.
# * The classes are things such as "airplane" and "frog", about which a caption can say much; OpenAI's list of prompts
#   is longer, with "a blurry photo of a {}." and the like.
# * That CLIP was trained on hundreds of millions of pairs from the web, among them many pictures of such things. How
#   right it is, and for which classes, the cell will tell you. Do not expect dice: its errors, too, follow from what
#   the images look like, and fall on some classes more than on others.
#
# The cell below downloads CIFAR-10 and OpenAI's weights, so it is not run here. Set `ONLINE = True` to try it. The
# whole thing, student included, is `python tclip.py --dataset cifar10`.

# %%
ONLINE = False
if ONLINE:
    big_teacher = tclip.load_clip("ViT-B/32", tclip.pick_device("auto"))
    cifar = tclip.load_images("cifar10", teacher=big_teacher)
    weights = tclip.text_classifier(big_teacher, cifar.classes, tclip.DATASETS["cifar10"].templates).cpu()
    answer = tclip.score(tclip.zero_shot_probs(cifar.features, weights), cifar.truth)
    print(dict(zip(cifar.classes, answer["per_class"])))
templates = tclip.DATASETS["cifar10"].templates
print(f"{len(templates)} prompts, such as", *templates[:4], sep="\n  ")
takeaway(
    f"a real CLIP goes through the same two calls, with {len(templates)} prompts in place of {len(RECIPE.templates)}."
)

# %% [markdown]
# ## Exercises
#
# **1.** Ask CLIP with the numerals "0", "1", ... for class names instead of words. Which are better, and is it the same
# class that is worst?
#
# <details><summary>Answer</summary>
#
# ```python
# numerals = tclip.text_classifier(teacher, tclip.NUMERALS, RECIPE.templates)
# answer = tclip.score(tclip.zero_shot_probs(images.features, numerals), images.truth)
# print(answer["accuracy"], dict(zip(images.classes, answer["per_class"])))
# ```
# The name of a class is a setting like any other. This CLIP has met both kinds, about equally often, so that little
# changes, and the same class is worst; a CLIP from the web may know one of two names far better, which is why
# `DATASETS` has names that differ from those of the data set's folders.
# </details>
#
# **2.** Invent a prompt for the offline CLIP, say "a sketch of a {}." What happens, and why is that better than an
# answer?
#
# <details><summary>Answer</summary>
#
# `tclip.text_classifier(teacher, images.classes, ["a sketch of a {}."])` raises a `UserError`: the tiny CLIP never met
# the word "sketch". Its vector would be all zeros, and the prompt would silently mean something else. "a drawing of a
# {}." is among the captions that it knows.
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
