"""What the tutorials share: colours that colour-blind readers can tell apart, pictures, and code with its link."""

import inspect
import os
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

sys.path.append(str(Path(__file__).resolve().parents[1]))
import tclip

# Okabe and Ito's palette, without its yellow, which is hard to see on white.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = "#000000 #E69F00 #56B4E9 #009E73 #0072B2 #D55E00 #CC79A7".split()

plt.rcParams |= {
    "figure.dpi": 80,
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
                ax.set_title(titles[i], fontsize=8, color=colors[i] if colors else BLACK)
    return figure


def show_shares(ax, confusion, classes, title, truth="what the image is"):
    """A confusion matrix (C, C) as shares of each row, in %."""
    shares = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    picture = ax.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=100)
    ax.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="what it is called", ylabel=truth, title=title)
    for t, row in enumerate(shares.round().int().tolist()):
        for p, share in enumerate(row):
            if share:
                ax.text(p, t, share, ha="center", va="center", fontsize=7, color="white" if share < 60 else "black")
    return picture


def real_clip():
    """What a real CLIP says of real images, and knows of them, where its features lie in TCLIP_DATA, or ../data.

    Returns a title, and names, truth, probs and features as in tclip.Images, with classes. Elsewhere: of the digits.
    """
    path = Path(os.environ.get("TCLIP_DATA", "../data"), "whurs19_openai_clip_features.npz")
    if not path.exists():
        config = tclip.Config(**tclip.DATASETS["digits"]["settings"], device="cpu", cache="none")
        images, _, classes = tclip.read_dataset(config)
        return "digits, the offline CLIP", SimpleNamespace(**vars(images), classes=classes)
    with np.load(path) as saved:
        features = F.normalize(torch.from_numpy(saved["images_ViT-B-32"]).float(), dim=1)  # (1005, 512)
        texts = F.normalize(torch.from_numpy(saved["texts_ViT-B-32"]).float(), dim=2)  # (107 prompts, 19, 512)
        truth, classes = torch.from_numpy(saved["labels"]), saved["classes"].tolist()
    probs = tclip.zero_shot_probs(features, F.normalize(texts.mean(0), dim=1))
    names = [f"{i:05d}" for i in range(len(truth))]
    images = dict(names=names, truth=truth, probs=probs, features=features)
    return "WHU-RS19, CLIP ViT-B/32", SimpleNamespace(**images, classes=classes)
