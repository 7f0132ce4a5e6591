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
# # 3. Can labels be mended, before a network learns from them and while it does?
#
# [![Open in Colab][badge]][colab]
#
# [Notebook 1](01_pseudo_labels.ipynb) ended with labels of which many are wrong, and wrong together. But images that
# are alike mostly share a class, and the teacher's names did not use that. Here you see how Bayes' rule puts the two
# together: first with CLIP's own image features, before anything is trained, then with the features of the student, as
# it learns. These are tclip's *ensemble labels*. (Of the paper only the name is known. The rule is ours.)
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
import inspect
import time
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from plots import BLACK, BLUE, GREEN, ORANGE, RED, SKY, real_clip, show_images, show_source, takeaway

import tclip

started = time.time()
QUICK = os.environ.get("TCLIP_QUICK") == "1"  # few images and epochs, to test that all cells run
EPOCHS = 2 if QUICK else 20
torch.manual_seed(0)
title, real = real_clip()  # of aerial images, WHU-RS19; where their file is missing, of the digits
T0, truth, N, C = real.probs.clamp_min(1e-6), real.truth, *real.probs.shape  # the rule takes logarithms of T0


def right(labels, truth=truth):
    """Share of labels (N, C) whose first name is right. The truth is for us to look at; the method never reads it."""
    return tclip.score(labels, truth)["accuracy"]


print(f"{title}: {N} images, {C} classes, {right(T0):.1%} of the names right")

# %% [markdown]
# ## What do two witnesses know of an image?
#
# The first witness, the *teacher*, looked at image $i$ and said $T^0_{ic}$. The second, the *neighbourhood*, are the
# $k$ images nearest to it in CLIP's embedding, without itself. The mean of what is said of them is $n_{ic}$. Bayes'
# rule asks of each witness how likely its word is where the class is $c$, and begins with the share $\pi_c$ that the
# class has among all images:
#
# $$\underbrace{q_{ic}}_{\text{posterior}} \;\propto\; \underbrace{\pi_c}_{\text{prior}} \;\cdot\;
# \underbrace{\frac{T^0_{ic}}{\text{mean}_j\, T^0_{jc}}}_{\text{the teacher's word}} \;\cdot\;
# \Big(\underbrace{\frac{n_{ic} + \varepsilon\,\pi_c}{\pi_c}}_{\text{the neighbourhood}}\Big)^{s}$$
#
# * **The prior** $\pi_c$, the *mass* of the class, is not known. It is the mean of the present labels.
# * **The teacher's word.** $T^0_{ic}$ is a posterior already, with the teacher's own idea of what is frequent in it.
#   Divided by its mean over all images it says how much likelier this word is where $c$ is true.
# * **The neighbourhood.** Here a share $n_{ic}$ of all is called $c$, elsewhere $\pi_c$: so the quotient is how many
#   times denser the class is here. The *smoothing* $\varepsilon$ says that no class is impossible.
# * **The sharpness** $s$ is how much the neighbourhood counts beside the teacher. Its $k$ images are more than one
#   witness, but not $k$: they are alike and said alike. The value was found by trial.

# %% tags=["picture"]
K = tclip.Config.label_neighbours
S, SMOOTHING = (inspect.signature(tclip.bayes_rule).parameters[name].default for name in ("sharpness", "smoothing"))
near, mass = tclip.neighbour_mean(real.features, T0, K), T0.mean(0)  # n (N, C), pi (C,)
density = (near + SMOOTHING * mass) / mass
q = F.normalize(mass * (T0 / T0.mean(0)) * density**S, p=1, dim=1)
print(f"k {K}, sharpness {S}, smoothing {SMOOTHING}; the same as bayes_rule:",
      torch.allclose(q, tclip.bayes_rule(T0, near, mass), atol=1e-5))  # fmt: skip
steps = {
    "zero-shot says": T0,
    "the neighbours are called": near,
    "... divided by the mass": F.normalize(density, p=1, dim=1),
    "what comes out": q,
}
for name, table in steps.items():
    print(f"{name:26}{right(table):.1%} right")
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
# The labels that come out are better, so ask the neighbours again: put what came out in the place of what was said, and
# go on for some rounds. The *momentum* $m$ keeps a share of the old label each time, $T \leftarrow m\,T + (1 - m)\,q$,
# so that no round turns everything over. Here it is with the division, and without it: $q \propto T^0 n^s$. Then a
# neighbourhood says a name often merely because it is said often everywhere, and what is said often is said more often
# in the next round.

# %%
ROUNDS, MOMENTUM = 20, tclip.Config.label_momentum


def rounds(answers, features, candour=None, divide=True, k=K):
    """Labels (N, C) after each round, a list. candour: comes below; a number in place of tclip's."""
    tables = [answers]
    for _ in range(ROUNDS):
        near, mass = tclip.neighbour_mean(features, tables[-1], k), tables[-1].mean(0)
        exponent = tclip.candour(answers, near) if candour is None else candour
        if divide:
            q = tclip.bayes_rule(answers, near, mass, exponent)
        else:
            q = (exponent * answers.log() + S * (near + SMOOTHING / C).log()).softmax(1)
        tables.append(torch.lerp(q, tables[-1], MOMENTUM).clamp_min(1e-6))
    return tables


runs = {"with the mass": rounds(T0, real.features), "without": rounds(T0, real.features, divide=False)}
there = truth.bincount(minlength=C)
order = T0.sum(0).argsort(descending=True)  # the class whose name zero-shot says most comes first
figure, (a, b) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=[2, 3])
for (name, tables), color, line, shift in zip(runs.items(), (BLUE, RED), ("-", "--"), (0, 0.27)):
    a.plot([100 * right(table) for table in tables], color=color, ls=line, label=name)
    b.bar(torch.arange(C) + shift, tables[-1].sum(0)[order], 0.27, color=color, hatch="//" if shift else "")
b.bar(torch.arange(C) - 0.27, T0.sum(0)[order], 0.27, color=SKY)
b.plot(torch.arange(C), there[order], "_", color=BLACK, ms=12, mew=2)
a.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
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
# ## What if the teacher is too sure?
#
# Bayes' rule takes witnesses at their word. A teacher that says 99 % whenever it opens its mouth, and is right in four
# of five cases, would shout down every neighbourhood. What it says should then count with an exponent $a$ below one,
# $(\pi_c T^0_{ic} / \text{mean}_j T^0_{jc})^a$: its *candour*. With truth one would find it by calibration: raise $T^0$
# to the power $b$ at which it foretells the truth best. Without truth, let it foretell what the neighbourhoods choose,
# of which it did not know:
#
# $$b = \arg\max_{0 \le b \le 1} \sum_i \Big( \max_c n_{ic}^{8} \cdot \log p_b(\text{choice of } i)
# + 0.01 \sum_c T^0_{ic} \log p_b(c) \Big), \qquad p_b(c) = \frac{(T^0_{ic})^b}{\sum_d (T^0_{id})^b}, \qquad a = b^8$$
#
# The eighth power of the largest share lets neighbourhoods of one mind testify, and hardly any others. Where there are
# none, the second term is left, the teacher's word about itself, which is best at $b = 1$. And $a = b^8$ soon drops a
# teacher that is found too sure. (Both powers, too, were found by trial.)
#
# To see it at work, take the real teacher, and make it surer than it is: $T^0$ to the power $p$. No name changes.

# %%
show_source(tclip.candour)
POWERS = [1, 2, 4] if QUICK else [1, 1.5, 2, 2.5, 3, 4, 6]
teachers = [(power * T0.log()).softmax(1).clamp_min(1e-6) for power in POWERS]
curves, found = {"a is the candour": [], "a = 1, always": []}, {"first round": [], "last round": []}
for answers in teachers:
    tables = rounds(answers, real.features)
    for name, said in (("first round", tables[0]), ("last round", tables[-1])):
        found[name].append(tclip.candour(answers, tclip.neighbour_mean(real.features, said, K)))
    curves["a is the candour"].append(right(tables[-1]))
    curves["a = 1, always"].append(right(rounds(answers, real.features, candour=1)[-1]))
figure, (a, b) = plt.subplots(1, 2, figsize=(10, 3.2))
for (name, values), color, marker in zip(found.items(), (SKY, BLUE), "os"):
    a.plot(POWERS, values, color=color, marker=marker, label=name)
for (name, values), color, marker in zip(curves.items(), (BLUE, RED), "s^"):
    b.plot(POWERS, [100 * v for v in values], color=color, marker=marker, label=name)
b.axhline(100 * right(T0), color="gray", lw=1, label="zero-shot")
a.set(xlabel="power p", ylabel="candour a", ylim=(-0.03, 1.05))
b.set(xlabel="power p", ylabel="labels that are right at the end, in %")
a.legend()
b.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
sure = [answers.amax(1).mean() for answers in teachers]
last, ends, believed = found["last round"], curves["a is the candour"], curves["a = 1, always"]
late = ends.index(min(ends))
takeaway(
    f"the teacher claims {sure[0]:.0%}, is {right(T0):.0%} right, and ends with a candour of {last[0]:g}. At "
    f"p = {POWERS[-1]} it claims {sure[-1]:.0%}, its candour is {last[-1]:g}, and {ends[-1]:.1%} of the labels end "
    f"right, not the {believed[-1]:.1%} of a teacher that is believed. But it is found late: the worst is "
    f"p = {POWERS[late]:g}, with a candour of {last[late]:g} and {ends[late]:.1%}."
)

# %% [markdown]
# ## What if some classes are rare?
#
# Nothing so far assumes how frequent a class is. A common assumption is that all are equally frequent. Here are
# images of which the rarest class has a tenth of the commonest, three draws of them, and `EnsembleLabels`, which is
# told nothing, or that classes are equally frequent (`class_prior`; `with_shares` finds the nearest labels with such
# shares), or the true shares.

# %%
results = {"zero-shot": [], "told nothing": [], "told: equal": [], "told: the true shares": []}
for seed in range(3):
    draw, kept = torch.Generator().manual_seed(seed), []
    for place, c in enumerate(torch.randperm(C, generator=draw).tolist()):
        members = (truth == c).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=draw)]
        kept.append(members[: round(len(members) * 10 ** (-place / (C - 1)))])
    kept = torch.cat(kept)
    shares = truth[kept].bincount(minlength=C) / len(kept)
    results["zero-shot"].append(right(T0[kept], truth[kept]))
    for name, prior in zip(list(results)[1:], (None, torch.ones(C), shares)):
        labels = tclip.EnsembleLabels(real.probs[kept], real.features[kept], class_prior=prior)
        results[name].append(right(labels.targets(slice(None)), truth[kept]))
figure, ax = plt.subplots(figsize=(8, 2.4))
for place, (name, values) in enumerate(results.items()):
    ax.barh(place, 100 * sum(values) / len(values), color=RED if "equal" in name else SKY)
    ax.plot([100 * v for v in values], [place] * len(values), "|", color=BLACK, ms=12, mew=2)
ax.set_yticks(range(len(results)), results)
ax.invert_yaxis()
ax.set(xlabel="labels that are right, in % (black: each draw)", xlim=(0, 101), title=f"{title}, classes 10 : 1")
plt.show()
mean = {name: sum(values) / len(values) for name, values in results.items()}
takeaway(
    f"with classes 10 : 1 and told nothing, the rule turns {mean['zero-shot']:.1%} into {mean['told nothing']:.1%}. "
    f"Told that classes are equal, which is false, it ends at {mean['told: equal']:.1%}; told the true shares, at "
    f"{mean['told: the true shares']:.1%}. Say it only where you know it."
)

# %% [markdown]
# ## What if the embedding knows nothing?
#
# Let the features be random: neighbours are strangers. What is $n_{ic}$ then? About $\pi_c$, for all images alike. So
# the quotient is about one for every class, which says nothing, and the labels stay the teacher's. That is the theory,
# and it holds as far as "about" does. A mean of $k$ strangers is far from $\pi_c$ if $k$ is small: some rare class has
# two of them by chance, and looks dense. The rule cannot know that it is chance. Worse than features that know nothing
# are those that know something else. If they are mixed up, so that each image has another's, neighbours do look alike,
# come to be of one mind, and testify against the teacher.

# %%
COUNTS = [K, 300] if QUICK else [K, 30, 100, 300]
random_features = F.normalize(torch.randn(N, 512), dim=1)
names = T0.argmax(1)
left = {"one look": [], f"{ROUNDS} rounds": []}
for k in COUNTS:
    tables = rounds(T0, random_features, k=k)
    q = tclip.bayes_rule(T0, tclip.neighbour_mean(random_features, T0, k), T0.mean(0))
    left["one look"].append((q.argmax(1) == names).float().mean().item())
    left[f"{ROUNDS} rounds"].append((tables[-1].argmax(1) == names).float().mean().item())
figure, ax = plt.subplots(figsize=(6, 2.6))
for (name, values), color, marker in zip(left.items(), (SKY, ORANGE), "os"):
    ax.semilogx(COUNTS, [100 * v for v in values], color=color, marker=marker, label=name)
ax.set_xticks(COUNTS, COUNTS)
ax.minorticks_off()
ax.set(xlabel="strangers asked, k", ylabel="names kept, in %", ylim=(0, 102))
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
mixed_up = tclip.EnsembleLabels(real.probs, real.features[torch.randperm(N)]).targets(slice(None))
takeaway(
    f"{ROUNDS} rounds among {COUNTS[-1]} strangers leave {left[f'{ROUNDS} rounds'][-1]:.0%} of the teacher's names, "
    f"among {K} they leave {left[f'{ROUNDS} rounds'][0]:.0%}, and features of other images leave "
    f"{(mixed_up.argmax(1) == names).float().mean():.0%}: features must know something, and be in order."
)

# %% [markdown]
# ## How does tclip do it?
#
# As above. `EnsembleLabels` does it twice: before training, in the teacher's features, where it has any, in rounds; and
# once after each epoch, in the student's embedding. What came out of the rounds takes the place of the teacher's word
# $T^0$ from then on.

# %%
show_source(tclip.bayes_rule, tclip.EnsembleLabels)
at_start = tclip.EnsembleLabels(real.probs, real.features).targets(slice(None))
same = (at_start.argmax(1) == runs["with the mass"][-1].argmax(1)).float().mean()
takeaway(
    f"{title}: zero-shot {right(T0):.1%} right, tclip's labels before training {right(at_start):.1%}. (Our rounds of "
    f"above give {same:.1%} of the images the same name; tclip keeps labels as float16.)"
)

# %% [markdown]
# ## Does a network learn wrong labels?
#
# Now to the student, on the digits, of which tclip is told that they are about equally frequent. `train` calls
# `on_epoch` after each epoch with the row of its log, the student and the labels; that is all we need to watch. We
# train twice. In the first run the labels stay as they are: the start is made by hand, and a momentum of one keeps all
# of an old label. In the second they follow. "Wrongly labelled" are the images whose label at the *start* of training
# is wrong. After each epoch the student is asked about the images, without augmentation.

# %%
config = tclip.Config(**tclip.DATASETS["digits"]["settings"], epochs=EPOCHS, device="cpu", cache="none")
images, _, classes = tclip.read_dataset(config)
images = tclip.Images(**{name: part[: 300 if QUICK else None] for name, part in vars(images).items()})
equal = torch.ones(len(classes))
start = tclip.EnsembleLabels(images.probs, images.features, class_prior=equal).targets(slice(None))  # (N, C)
first, truth = start.argmax(1), images.truth  # (N,)
wrong = first != truth
said, tables, candours = {}, {}, {}
frozen = replace(config, label_momentum=1.0, class_prior="none"), start, None
follow = config, images.probs, images.features
for name, (settings, answers, features) in (("frozen labels", frozen), ("ensemble labels", follow)):
    said[name], tables[name], candours[name] = [], [start], []

    def watch(row, student, labels, name=name):
        said[name].append(tclip.predict(student, images.pixels).argmax(1))  # (N,)
        tables[name].append(labels.targets(slice(None)))  # (N, C)
        candours[name].append(row["candour"])

    tclip.train(settings, images.pixels, answers, features, on_epoch=watch)
    said[name], tables[name] = torch.stack(said[name]), torch.stack(tables[name])  # (E, N), (E + 1, N, C)
print(f"right: CLIP's names {right(images.probs, truth):.1%}, the labels at the start of training "
      f"{right(start, truth):.1%}; wrongly labelled: {wrong.sum()} of {len(truth)} images")  # fmt: skip

# %%
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
# memorised. The step is the one of above, with neighbours in the student's embedding, and with what the student said of
# them. It said so during the epoch, about the augmented views that it was trained on (`record`): no image has to be
# looked at again.
#
# How much does the first witness still count? CLIP's features of the digits lead where its names lead: the rounds
# before training mend some, and make all labels surer. The student's neighbourhoods differ, and the candour shows it.

# %%
print("candour after each epoch:", *(f"{value:g}" for value in candours["ensemble labels"]))
claimed, is_right = start.amax(1).mean(), right(start, truth)
takeaway(
    f"the labels before training claim {claimed:.0%} and are {is_right:.0%} right. Their candour is "
    f"{candours['ensemble labels'][0]:g} after the first epoch and {candours['ensemble labels'][-1]:g} in the end."
)

# %% [markdown]
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
    f"that were wrong are wrong still. {right(images.probs, truth):.1%} were right as CLIP said "
    f"them, {right(start, truth):.1%} at the start of training, and "
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
# Each half has half the prior, half the neighbours and half the mass. Both likelihoods are what those of the whole
# were, and so together the halves get what the class got. In a vote each half has half the votes, and loses against
# others.
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
