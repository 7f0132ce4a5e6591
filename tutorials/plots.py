"""What the tutorials share: colours that colour-blind readers can tell apart, pictures, and code with its link."""

import inspect
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import display
from matplotlib.patheffects import withStroke

sys.path.append(str(Path(__file__).resolve().parents[1]))
import tclip

# Okabe and Ito's palette, without its yellow, which is hard to see on white.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()

# No figure is wider than nine inches: so its text can be read where it is shown at half its size, too.
plt.rcParams |= {
    "figure.dpi": 100,
    "font.size": 14,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
}


def show_markdown(markdown, plain):
    """Show the first in a notebook, and print the second elsewhere."""
    if get_ipython():
        display({"text/markdown": markdown, "text/plain": plain}, raw=True)
    else:
        print(plain)


def takeaway(text):
    """Show one bold line. The figures in it come from code."""
    show_markdown(f"**Take-away: {text}**", f"Take-away: {text}")


def show_source(*functions):
    """Show the code of functions of tclip.py as it runs here, under links to their lines. A script only names them."""
    for function in functions:
        markdown, plain, code = source_of(function)
        show_markdown(markdown, plain)
        if get_ipython():
            print(code, flush=True)  # as Markdown some viewers lose its columns


def source_of(function):
    """The link to the lines of a function of tclip.py, in Markdown and as plain text, and its code."""
    lines, first = inspect.getsourcelines(function)
    span = f"L{first}-L{first + len(lines) - 1}"
    link = f"[tclip.py, {span}](../tclip.py#{span})"
    return link, f"{function.__qualname__}: tclip.py, {span}", textwrap.dedent("".join(lines))


def show_images(pixels, titles=None, columns=10, colors=None, side=0.85):
    """A grid of images, uint8 or float (N, 3, H, W), each with its title. Returns the figure."""
    rows = -(-len(pixels) // columns)
    height = side * (1.35 if titles else 1.05)
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns, height * rows), squeeze=False)
    for i, ax in enumerate(axes.flat):
        ax.axis("off")
        if i < len(pixels):
            ax.imshow(pixels[i].permute(1, 2, 0).numpy())
            if titles:
                ax.set_title(titles[i], color=colors[i] if colors else BLACK)
    return figure


def show_map(ax, points, marks, wrong, title):
    """A map (N, 2): silver dots, red crosses where `wrong` (N,). Marks, a letter each, where they find room."""
    for which, color, marker in ((~wrong, "silver", "o"), (wrong, RED, "x")):
        ax.scatter(*points[which].T, s=18, color=color, marker=marker, linewidths=1)
    places, shown = (points - points.min(0)) / np.ptp(points, axis=0), []
    for i in np.random.default_rng(0).permutation(len(points)):
        if all(np.abs(places[i] - places[j]).max() > 0.07 for j in shown):
            shown.append(i)
            text = ax.text(*points[i], marks[i], ha="center", va="center", size=16, weight="bold")
            text.set(color=RED if wrong[i] else BLACK, path_effects=[withStroke(linewidth=3, foreground="white")])
    ax.set(title=title, xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def show_shares(ax, confusion, classes, title, truth="what the image is", letters=None):
    """A confusion matrix (C, C) as shares of each row, in %. A class has a letter, which stands alone below."""
    shares = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    picture = ax.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=100)
    letters = letters or [chr(ord("A") + c) for c in range(len(classes))]
    ax.set_xticks(range(len(classes)), letters)
    ax.set_yticks(range(len(classes)), [f"{name}  {letter}" for name, letter in zip(classes, letters)])
    ax.set(xlabel="what it is called", ylabel=truth, title=title)
    for t, row in enumerate(shares.round().int().tolist()):
        for p, share in enumerate(row):
            if share:
                ax.text(p, t, share, ha="center", va="center", fontsize=13, color="white" if share < 60 else "black")
    return picture


def real_clip():
    """What OpenAI's CLIP ViT-B/32 says of WHU-RS19, aerial images, and knows of them: see real_answers.py.

    A title, and an object with truth (N,), probs (N, C), features (N, D), classes, the unit mean_text (C, D) of its
    prompts, and of some prompts the unit texts (P, C, D). Which image a row is, is not known, only its class.
    """
    saved = real_answers()
    names = "features", "mean_text", "texts"
    kept = {name: F.normalize(torch.from_numpy(saved[name]).float(), dim=-1) for name in names}
    kept |= dict(probs=tclip.zero_shot_probs(kept["features"], kept["mean_text"]), prompts=saved["prompts"].tolist())
    truth, classes = torch.from_numpy(saved["truth"]), saved["classes"].tolist()
    return "WHU-RS19, CLIP ViT-B/32", SimpleNamespace(**kept, truth=truth, classes=classes)


def gpt4v():
    """How GPT-4V names images of EuroSAT: how many of each true class have got each name (10, 10), and the classes."""
    saved = real_answers()
    return torch.from_numpy(saved["gpt4v"]), saved["eurosat_classes"].tolist()


def real_answers():
    """The arrays of real_answers.npz."""
    with np.load(Path(__file__).with_name("real_answers.npz"), allow_pickle=False) as saved:
        return dict(saved)
