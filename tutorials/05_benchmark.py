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
# # 5. Is it better than what one would do otherwise?
#
# [![Open in Colab][badge]][colab]
#
# A method is worth its complexity only if simpler ones do worse with the same labels. Here it meets others, and each of
# its own halves: first at a small scale, while you wait, then at full length, from results that are kept.
#
# The code: [baselines.py](benchmark/baselines.py), the other methods, a few lines each;
# [suites.py](benchmark/suites.py), images and whose answers about them; [run.py](benchmark/run.py), seeds and tables.
#
# [badge]: https://colab.research.google.com/assets/colab-badge.svg
# [colab]: https://colab.research.google.com/github/OWNER/tclip/blob/main/tutorials/05_benchmark.ipynb

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
sys.path.append("benchmark")

# %%
import inspect
import tempfile
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import run as benchmark
from baselines import ELR, METHODS, STARTED
from plots import BLACK, BLUE, ORANGE, SKY, show_markdown, takeaway

import tclip

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # two methods and few epochs, to test that all cells run
FEW, EPOCHS, SEEDS = (100, 1, 1) if QUICK else (400, 12, 2)  # images, epochs, seeds

settings = benchmark.SUITES["digits"].settings | dict(class_prior="none", device="cpu", cache="none")
config = tclip.Config(**settings | dict(batch_size=32, epochs=EPOCHS))
load = partial(benchmark.load, "digits", count=FEW)
task = load(config)
print(f"{len(task.unlabeled.names)} unlabeled and {len(task.heldout.names)} held-out images, named by {task.teacher}")

# %% [markdown]
# ## What is compared?
#
# All methods get the same images, the same pseudo-labels and the same network, augmentation, batch size, number of
# epochs, optimiser and learning rate. None sees the truth. Hyperparameters of their own are those of the papers, as far
# as the papers have them.
#
# Most are a function that takes the place of `tclip_objective` in the step that [notebook 4](04_training_loop.ipynb)
# built. Here is one, early-learning regularisation (ELR): it keeps CLIP's names, but also a running mean of what the
# student says of each image, and holds it to that.

# %%
for name, method in METHODS.items():
    print(f"{name:24} {method.source}")
print("\n" + inspect.getsource(ELR))
rivals = [name for name in METHODS if not name.startswith("tclip")]
takeaway(f"{len(rivals)} other methods and tclip, with and without its parts, learn from the very same answers.")

# %% [markdown]
# ## Does it hold while I watch?
#
# All of them, on few images and for few epochs. tclip also mends the labels *before* training, by the teacher's image
# features ([notebook 3](03_ensemble_labels.ipynb)); the last line gives this start to plain cross-entropy as well, to
# tell what comes of better labels and what of better training.
#
# *Unlabeled* and *held out* say how many images the student names right, of those that it was trained on and of others;
# *worst class* is the lowest such number of a single class, of the unlabeled images; *labels*, how many of the labels
# are right that a method ends with. All in %, mean and standard deviation over the seeds.

# %%
methods = [*METHODS, *[name for name in STARTED if name.startswith("cross-entropy")]]
methods = ["cross-entropy", "tclip", "tclip without C3L", "tclip with fixed labels"] if QUICK else methods
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "digits.csv"  # a row for each run
    benchmark.benchmark(path, "digits", config, task, load, methods, SEEDS)
    rows = benchmark.read_rows(path)
lines = benchmark.summarise(rows)

# %%
show_markdown(benchmark.table(lines), benchmark.table(lines))

# %% tags=["picture"]
teacher, *students = lines
figure, ax = plt.subplots(figsize=(8, 0.6 + 0.34 * len(students)))
for place, line in enumerate(students):
    mean, sd = (100 * x for x in line["unlabeled"])
    worst, spread = (100 * x for x in line["worst class"])
    ax.barh(place, mean, xerr=sd, color=BLUE if line["name"].startswith("tclip") else SKY, capsize=3)
    ax.errorbar(worst, place, xerr=spread, color=ORANGE, marker="D", ms=5, capsize=3, ls="")
ax.axvline(100 * teacher["unlabeled"][0], color=BLACK, ls="--")
ax.set_yticks(range(len(students)), [line["name"] for line in students])
ax.invert_yaxis()
ax.set(xlabel="unlabeled images named right, in %", xlim=(0, 101))
handles = [plt.Rectangle((0, 0), 1, 1, color=BLUE), plt.Line2D([], [], color=ORANGE, marker="D", ls=""),
           plt.Line2D([], [], color=BLACK, ls="--")]  # fmt: skip
figure.legend(handles, ["all classes", "worst class", "teacher"], loc="outside upper center", ncols=3)
plt.show()
by_name = {line["name"]: line["unlabeled"][0] for line in students}
best = max((name for name in by_name if name in rivals), key=by_name.get)
takeaway(
    f"on {FEW} images, from a teacher that is {teacher['unlabeled'][0]:.1%} right, tclip makes a student of "
    f"{by_name['tclip']:.1%}; the best of the others, {best}, one of {by_name[best]:.1%}."
)

# %% [markdown]
# ## Is one seed enough?
#
# No: a student that starts from other weights ends elsewhere. How far apart are two runs of the same method?

# %%
apart = {}
for line in students:
    shares = [float(row["unlabeled"]) for row in rows if row["method"] == line["name"]]
    apart[line["name"]] = max(shares) - min(shares)
widest = max(apart, key=apart.get)
takeaway(
    f"with {SEEDS} seeds the runs of one method differ by up to {100 * apart[widest]:.1f} points ({widest}), those of "
    f"tclip by {100 * apart['tclip']:.1f}. A smaller difference between two methods says nothing."
)

# %% [markdown]
# ## Do I need both halves?
#
# Two lines of the table leave one half out: the contrastive loss, or the labels that follow the student.

# %%
without = {part: by_name["tclip"] - by_name[f"tclip {part}"] for part in ("without C3L", "with fixed labels")}
takeaway(
    f"on these few images the contrastive loss is worth {100 * without['without C3L']:+.1f} points beside the ensemble "
    f"labels, and the ensemble labels {100 * without['with fixed labels']:+.1f} points beside the contrastive loss."
)

# %% [markdown]
# ## And at full length?
#
# `python tutorials/benchmark/run.py --suite digits` does all runs with all images and 40 epochs. It can be stopped and
# goes on where it was; a finished run is a row of [the results](benchmark/results/README.md). These are the kept ones.
# (Seconds are wall time; the machine had other work beside.)

# %%
whole = benchmark.load("digits", tclip.Config(**settings), count=None)
names = METHODS | STARTED
kept = list(benchmark.finished(benchmark.RESULTS / "digits.csv", tclip.Config(**settings), whole, names).values())
if kept:
    full = benchmark.summarise(kept)
    show_markdown(benchmark.table(full), benchmark.table(full))
    print("\nmade on " + "; ".join(sorted({f"{row['device']}, torch {row['torch']}" for row in kept})))
else:
    print("nobody has run it yet")

# %% [markdown]
# With real teachers and natural images it is, for example, `--suite eurosat-gpt4v --root data` (named by GPT-4V, for a
# CPU) and `--suite cifar10-votes --root data --full` (a ResNet-18, for a GPU); each says which public files it needs.
#
# ## What is unfair about this comparison?
#
# - The settings of tclip were chosen by looking at results on some of the suites, these digits among them, and so was
#   the schedule that all share. Those of the others come from papers on other images, with longer schedules and larger
#   networks. [The results](benchmark/results/README.md) say on which suites nothing was chosen.
# - Only tclip reads the teacher's image features. The lines "on tclip's start" hand the others what comes of that.
# - *SimCLR + CE* and *SupCon + CE* are cross-entropy and that loss added up, with equal weight. Their papers train the
#   one after the other.
# - Co-teaching is told in its paper how many labels are wrong. Here it believes the teacher's own doubt, which is far
#   too small. It also trains two networks, and costs more. In its first ten epochs it drops few images, and so shows
#   little of itself in the short runs above.
# - *Balanced labels* take classes for equally frequent. That is about true of the digits, and tclip is not told so here
#   (exercise 2).
#
# **Take-away: read a table of results for what its authors could choose.**
#
# ## Exercises
#
# **1.** Write a method of your own: an objective is any function of logits, embeddings, the images' numbers, the
# labels and the settings. Try the mean absolute error.
#
# <details><summary>Answer</summary>
#
# ```python
# from dataclasses import replace
#
# def mae(logits, z, index, labels, config):
#     targets = labels.targets(index).repeat(2, 1)  # (2B, C)
#     return (logits.softmax(1) - targets).abs().sum(1).mean(), 0 * logits.sum()
#
# images = task.unlabeled
# fixed = replace(config, label_momentum=1.0)
# student, _ = tclip.train(fixed, images.pixels, images.probs, objective=mae)
# print(tclip.score(tclip.predict(student, images.pixels), images.truth)["accuracy"])
# ```
# It is known to be robust to wrong labels, and hard to learn from: far from the label its gradient is small.
# </details>
#
# **2.** What do you gain if tclip is told that classes are about equally frequent?
#
# <details><summary>Answer</summary>
#
# ```python
# from dataclasses import replace
#
# student, _ = METHODS["tclip"].run(replace(config, class_prior="uniform"), task.unlabeled)
# print(tclip.score(tclip.predict(student, task.unlabeled.pixels), task.unlabeled.truth)["accuracy"])
# ```
# One run is one seed: compare it with the spread in the table.
# </details>

# %%
print(f"this notebook took {time.time() - started:.0f} s")
