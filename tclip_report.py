"""tclip_report: one page, report.html, that shows what a run of tclip did to the labels, with the images themselves.

    write_report(path, config, images, probs, labels, student_probs, summary, history, skipped)
    draw_noise(path, classes, teacher, student)                     # the confusion matrices alone, as a picture

The page holds everything it shows: no script, no font, no link. It reads on a phone, in the dark and on paper. tclip
writes it at the end of a run where this file lies beside tclip.py, and trains without it where it does not.
"""

import base64
import html
import io
import math
import platform
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image

import tclip

SHOWN = 24  # images in a grid: its 3, 6 or 8 columns are full
SAME_KIND = SHOWN // 3  # of them at most so many with the same old and new name
MATRIX_CLASSES, NUMBER_CLASSES = 30, 12  # up to which the matrices are drawn, and have numbers in their cells
LISTED_CLASSES, LISTED_PAIRS, LISTED_FILES = 16, 12, 50  # in the lists, before the rest is folded or left out


def write_report(path, config, images, probs, labels, student_probs, summary, history, skipped=()):
    """Write the page to `path`, whole or not at all.

    config         tclip.Config
    images         tclip.Images; of pixels nothing but `pixels[index]` is used, for the few images that are shown
    probs          (N, C), the teacher's pseudo-labels
    labels         (N, C), the ensemble labels at the end
    student_probs  (N, C), the student's predictions for the same images
    summary        dict of tclip.run(); an accuracy in it may be None or missing
    history        rows of metrics.csv, as dicts
    skipped        dict of file and reason for each file that could not be read
    """
    run = Run(images, probs, labels, student_probs)
    body = [
        headline(run, config, summary, skipped),
        curves(config, history),
        class_by_class(run),
        noise(run),
        surest_changes(run),
        least_sure(run),
        appendix(config, summary, skipped),
    ]
    page = PAGE.format(title=text(f"tclip: {config.images or config.dataset}"), css=CSS, body="\n".join(body))
    tclip.write_whole(Path(path), lambda draft: draft.write_text(page, encoding="utf-8"))


class Run:
    """What the page is about: the names (numbers of classes) that N images were given, and how right they were.

    teacher, label, student   int64 (N,): the names by probs, labels and student_probs
    truth                     int64 (N,), -1 where unknown; None where no class is known
    by_teacher, by_student    tclip.score() of the two, per_class their accuracies for each class
    """

    def __init__(self, images, *tables):
        self.images = images
        self.probs, self.labels, self.student_probs = (table.detach().float().cpu() for table in tables)
        self.teacher, self.label, self.student = (t.argmax(1) for t in (self.probs, self.labels, self.student_probs))
        self.truth = images.truth.cpu() if images.truth is not None and (images.truth >= 0).any() else None
        self.by_teacher, self.by_student = (tclip.score(t, self.truth) for t in (self.probs, self.student_probs))
        self.per_class = self.by_teacher["per_class"], self.by_student["per_class"]

    def name(self, number):
        """Name of a class, ready for the page."""
        return text(self.images.classes[number], limit=48)


# ======================================================================================================================
# Small helpers: text() is the only way by which anything from outside comes onto the page.
# ======================================================================================================================


def text(value, limit=160):
    """A value from outside as harmless HTML, for text and attributes: one line, not endless, nothing invisible.

    What cannot be written as UTF-8 (undecodable file names), control characters and those that turn the direction of
    the text around them become U+FFFD. Place it in <bdi> where other text follows on the line.
    """
    line = " ".join(str(value).split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    return html.escape(re.sub("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", line))


def percent(share, digits=1):
    """A share as "12.3 %", or "?" for None. (With a space that does not break.)"""
    return "?" if share is None else f"{100 * share:.{digits}f}\xa0%"


def count(number, noun):
    """1 image, 1,437 images."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds):
    """59 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def arrow(values):
    """Before → after. A line breaks between them, not within, and the arrow goes with what comes after."""
    first, *rest = values
    return " ".join([f"<span>{first}</span>", *(f"<span>→ {value}</span>" for value in rest)])


def section(title, lead, *parts):
    """A section of the page. lead: what is to be seen, in a sentence or two."""
    return f"<section>\n<h2>{title}</h2>\n<p class=lead>{lead}</p>\n" + "\n".join(parts) + "\n</section>"


def folded(title, content):
    """Content that is shown on a click."""
    return f"<details><summary>{title}</summary>\n{content}\n</details>"


def table(rows):
    """Rows of (name, value), both HTML, as a table."""
    rows = [f"<tr><th scope=row>{name}</th><td>{value}</td></tr>" for name, value in rows]
    return "<table>" + "\n".join(rows) + "</table>"


# ======================================================================================================================
# The sections, in the order of the page
# ======================================================================================================================


def headline(run, config, summary, skipped):
    """The result in plain words, and what it is the result of."""
    total, classes = len(run.label), len(run.images.classes)
    changed = (run.label != run.teacher).float().mean().item()
    confidence = run.student_probs.max(1).values.mean().item()
    tiles = [("labels changed", percent(changed)), ("student’s mean confidence", percent(confidence))]
    if run.truth is None:
        agreed = (run.student == run.teacher).float().mean().item()
        title = f"Student and teacher agree on <b>{percent(agreed)}</b> of {count(total, 'image')}"
        lead = NO_TRUTH
    else:
        before, after = run.by_teacher["accuracy"], run.by_student["accuracy"]
        title = f"Teacher <b class=teacher>{percent(before)}</b> → student <b class=student>{percent(after)}</b> right"
        known = (run.truth >= 0).sum().item()
        which = f"{total:,} unlabeled images" + f", of which the true class of {known:,} is known" * (known < total)
        lead = f"on the {which}. {verdict(before, after)}"
        worst = [min((a, c) for c, a in enumerate(per_class) if a is not None) for per_class in run.per_class]
        worst = [f"{percent(a)} <small><bdi>{run.name(c)}</bdi></small>" for a, c in worst]
        tiles.insert(0, ("worst class", arrow(worst)))
        heldout = [summary.get(key) for key in ("teacher_inductive_accuracy", "inductive_accuracy")]
        if heldout[1] is not None:
            tiles.insert(0, ("held-out images", arrow(percent(a) for a in heldout if a is not None)))
    unused = (run.student.bincount(minlength=classes) == 0).nonzero().flatten().tolist()
    if unused:
        names = ", ".join(f"<bdi>{run.name(c)}</bdi>" for c in unused[:5]) + ", …" * (len(unused) > 5)
        lead += f" <strong>The student never says {names}</strong>: {len(unused)} of {classes} classes."
    facts = [text(config.images or config.dataset), count(total, "image"), count(classes, "class")]
    facts += [f"{count(len(skipped), 'file')} skipped"] * bool(skipped) + [
        f"teacher {text(summary.get('teacher', config.clip))}"
    ]
    if summary.get("seconds") is not None:
        facts.append(f"{duration(summary['seconds'])} on {text(summary.get('device', config.device))}")
    facts = " · ".join(f"<span>{fact}</span>" for fact in facts)
    tiles = "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    return (
        f"<header>\n<p class=facts>{facts}</p>\n<h1>{title}</h1>\n<p class=lead>{lead}</p>\n"
        f"<dl class=tiles>\n{tiles}\n</dl>\n</header>"
    )


NO_TRUTH = (
    "Agreement is not accuracy: it says how often the student kept its teacher’s name, not which of the two is right. "
    "No true class is known here; the images below are there for your own judgement."
)


def verdict(before, after):
    """One sentence that compares two accuracies, also where the second is the worse."""
    if after < before:
        return "The student ended <strong>below its teacher</strong>: these labels and settings did not help it."
    if after == before:
        return "The student is as often right as its teacher."
    fewer = percent((after - before) / (1 - before), 0)
    return f"The student makes {fewer} fewer mistakes than the teacher it learned from."


def curves(config, history):
    """Losses and changed labels over the epochs."""
    if not history:
        return section("How the training went", "No epoch was trained.")
    epochs = [int(row["epoch"]) for row in history]
    kinds = [("loss", "loss"), ("cross-entropy", "cross_entropy"), ("contrastive", "c3l")]
    losses = [(name, [float(row[key]) for row in history]) for name, key in kinds]
    changed = [("labels changed", [100 * float(row["labels_changed"]) for row in history])]
    lead = "The losses should fall, then level off; the labels should move, then settle."
    if config.class_prior == "uniform":
        lead += " Where some differ already at the start, balancing the classes moved them."
    charts = f"<div class=pair>{chart(epochs, losses)}{chart(epochs, changed, ' %')}</div>"
    return section("How the training went", lead, charts)


def chart(epochs, series, unit=""):
    """A line chart as inline SVG, from zero up. series: (name, values) each, which are drawn in the page's colours."""
    width, height, left, right, top, bottom = 480, 220, 44, 10, 10, 26
    highest = max(max(values) for _, values in series)
    ticks = round_steps(highest)
    first, last = epochs[0], max(epochs[-1], epochs[0] + 1)

    def x(epoch):
        return left + (epoch - first) / (last - first) * (width - left - right)

    def y(value):
        return height - bottom - value / ticks[-1] * (height - top - bottom)

    parts = [f'<path d="M{left} {y(v):.1f}H{width - right}"/>' for v in ticks]
    parts += [f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor=end>{v:g}{unit}</text>' for v in ticks]
    marks = [first] + [int(e) for e in round_steps(epochs[-1])[1:] if first < e <= epochs[-1] and e == int(e)]
    parts += [
        f'<text x="{x(e):.1f}" y="{height - 6}" text-anchor=middle>{"epoch " * (e == first)}{e}</text>' for e in marks
    ]
    legend = []
    for i, (name, values) in enumerate(series):
        points = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in zip(epochs, values))
        parts.append(f'<polyline class=c{i} points="{points}"/>')
        parts.append(
            f'<circle class=c{i} r=1.25 cx="{x(epochs[-1]):.1f}" cy="{y(values[-1]):.1f}"/>'
        )  # all of one epoch
        change = f"{values[0]:.3g} → {values[-1]:.3g}{unit}"
        legend.append(
            f"<span><svg class=key viewBox='0 0 16 8'><path class=c{i} d='M0 4H16'/></svg>{name} {change}</span>"
        )
    label = f"{', '.join(name for name, _ in series)} over epochs {first} to {epochs[-1]}"
    svg = f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure class=chart>{svg}<figcaption>{' '.join(legend)}</figcaption></figure>"


def round_steps(highest):
    """Round numbers from 0 to `highest` or just above, in three to six steps."""
    highest = highest if highest > 0 else 1
    power = 10 ** math.floor(math.log10(highest))
    step = next(s * power for s in (0.2, 0.25, 0.5, 1, 2) if highest <= 5.001 * s * power)
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def class_by_class(run):
    """How often teacher and student say each class, and how often they are right about it. The worst come first."""
    classes, known = len(run.images.classes), run.truth is not None
    all_known = known and bool((run.truth >= 0).all())
    said = [(names.bincount(minlength=classes).double() / len(names)).tolist() for names in (run.teacher, run.student)]
    true = (run.by_teacher["confusion"].sum(1).double() / len(run.label)).tolist()
    longest = max(map(max, [*said, true]))
    lead = "For each class: the share of all images that is called so"
    if known:
        order = sorted(range(classes), key=lambda c: (run.per_class[1][c] is None, run.per_class[1][c]))
        lead += ", with a mark where it should be" * all_known + ", and how many of its own images are named right. "
        lead += "The student’s worst class comes first."
    else:
        order = sorted(range(classes), key=lambda c: -round(abs(said[0][c] - said[1][c]), 9))
        lead += ". Where the student differs most comes first."
    rows = []
    for c in order:
        cells = [bars([shares[c] for shares in said], longest, true[c] if all_known else None)]
        cells += [bars([shares[c] for shares in run.per_class], 1)] if known else []
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><th scope=row><bdi>{run.name(c)}</bdi></th>{cells}</tr>")
    head = "<tr><th scope=col>class<th scope=col>share of images" + "<th scope=col>named right" * known
    parts = [part for part in (rows[:LISTED_CLASSES], rows[LISTED_CLASSES:]) if part]
    tables = [f"<table class=classes>{head}{''.join(part)}</table>" for part in parts]
    tables[1:] = [folded(f"{count(len(parts[1]), 'more class')}", rest) for rest in tables[1:]]
    return section("Class by class", lead, KEY, *tables)


def bars(shares, top, mark=None):
    """Two bars with their numbers, teacher above student. top: the share that fills the width."""
    tick = "" if mark is None else f'<i style="left:{100 * mark / top:.1f}%"></i>'
    return "".join(
        f'<div class="bar {who}"><span><b style="width:{100 * (share or 0) / top:.1f}%"></b>{tick}</span>'
        f"<em>{percent(share)}</em></div>"
        for who, share in zip(("teacher", "student"), shares)
    )


def noise(run):
    """Confusion matrices of teacher and student; without truth, what the student calls the teacher's classes."""
    classes = len(run.images.classes)
    if run.truth is not None:
        title, called = "The noise, before and after", "called"
        lead = "A row is a true class: the names its images are given, in % of them. Blue is right, orange is noise."
        matrices = [("Teacher", run.by_teacher), ("Student", run.by_student)]
        matrices = [(f"{who}: {percent(score['accuracy'])} right", score["confusion"]) for who, score in matrices]
    else:
        title, called = "What the teacher called x is now called y", "now called"
        lead = (
            "A row is a name of the teacher’s: what the student calls those images, in % of them. Orange is a new name."
        )
        cells = (run.teacher * classes + run.student).bincount(minlength=classes**2).view(classes, classes)
        matrices = [("From the teacher’s names (rows) to the student’s", cells)]
    draw = matrix
    if classes > MATRIX_CLASSES:
        draw, lead = pair_list, f"The most frequent ones; a matrix of {classes} classes would be a blur."
    return section(title, lead, f"<div class=pair>{''.join(draw(run, *m, called) for m in matrices)}</div>")


def matrix(run, caption, cells, called):
    """A (C, C) matrix of counts as a table, coloured and numbered by each cell's share of its row."""
    names, numbered = [run.name(c) for c in range(len(cells))], len(cells) <= NUMBER_CLASSES
    rows = ["<td></td>" + "".join(f'<th scope=col title="{name}"><bdi>{name}</bdi></th>' for name in names)]
    for r, row in enumerate(cells.tolist()):
        rows.append(f'<th scope=row title="{names[r]}"><bdi>{names[r]}</bdi></th>')
        for c, number in enumerate(row):
            share = number / max(sum(row), 1)
            kind = ("right" if r == c else "wrong") + " full" * (share > 0.7)  # full: its number is light on dark
            hint = f"{names[r]} {called} {names[c]}: {number} of {sum(row)}"
            shown = f"{100 * share:.0f}" if numbered and share >= 0.005 else ""
            filled = f'<td class="{kind}" style="--v:{share:.2f}" title="{hint}">{shown}</td>'
            rows[-1] += filled if number else "<td></td>"
    kind, width = ("numbers", 3.2) if numbered else ("small", 1.3)
    return (
        f'<figure><figcaption>{caption}</figcaption><div class=scroll tabindex=0 role=region aria-label="{caption}">'
        f'<table class="matrix {kind}" style="max-width:{width * len(cells) + 7:.0f}rem">'
        + "".join(f"<tr>{row}</tr>\n" for row in rows)
        + "</table></div></figure>"
    )


def pair_list(run, caption, cells, called):
    """The most frequent cells beside the diagonal of a (C, C) matrix of counts, as a list."""
    totals, beside = cells.sum(1), cells - cells.diag().diag()
    numbers, where = beside.flatten().sort(descending=True, stable=True)
    items = []
    for number, cell in zip(numbers[:LISTED_PAIRS].tolist(), where.tolist()):
        r, c = divmod(cell, len(cells))
        if number:
            share = f"{count(number, 'image')}, {percent(number / totals[r].item(), 0)}"
            items.append(f"<li><bdi>{run.name(r)}</bdi> {called} <bdi>{run.name(c)}</bdi> <em>{share}</em></li>")
    return f"<figure><figcaption>{caption}</figcaption><ol>{''.join(items) or '<li>None.</li>'}</ol></figure>"


def surest_changes(run):
    """The images whose ensemble label differs from the teacher's and is surest."""
    confidence = run.labels.max(1).values
    changed = (run.label != run.teacher).nonzero().flatten()
    if not len(changed):
        return section("Surest changes", "No label changed: every image ends with the name its teacher gave.")
    shown, kinds = [], Counter()
    for i in changed[confidence[changed].argsort(descending=True, stable=True)].tolist():
        if len(shown) == SHOWN:
            break
        kind = run.teacher[i].item(), run.label[i].item()
        if kinds[kind] < SAME_KIND:
            shown.append(i)
            kinds[kind] += 1
    lead = (
        f"{count(len(changed), 'image')} ended with another label than the teacher’s. These are the surest, at most "
        f"{SAME_KIND} of one kind: the teacher’s name, the new one, and how sure the label is."
    )
    captions = [
        f"<s><bdi>{run.name(run.teacher[i])}</bdi></s><b><bdi>{run.name(run.label[i])}</bdi></b>"
        f"<em>{percent(confidence[i].item(), 0)}{verified(run, i, run.label[i])}</em>"
        for i in shown
    ]
    return section("Surest changes", lead, grid(run, shown, captions))


def least_sure(run):
    """The images for which the student's two best names are closest."""
    shares, names = run.student_probs.topk(min(2, len(run.images.classes)))
    shown = (shares[:, 0] - shares[:, -1]).argsort(stable=True)[:SHOWN].tolist()
    captions = []
    for i in shown:
        best, true = names[i].tolist(), None if run.truth is None else run.truth[i].item()
        lines = [f"<bdi>{run.name(c)}</bdi> <small>{percent(p.item(), 0)}</small>" for c, p in zip(best, shares[i])]
        lines = [line + TICK * (c == true) for c, line in zip(best, lines)]
        neither = "" if true in best else f"<em>{verified(run, i, best[0])}</em>"
        captions.append(f"<b>{lines[0]}</b><span>{lines[-1]}</span>{neither}")
    lead = (
        "Its two best names are nearly level here. If you label a few images by hand, or look for ones that belong to "
        "no class, begin with these."
    )
    return section("Where the student is least sure", lead, grid(run, shown, captions))


TICK = "\xa0<i class=yes title=right>✓</i>"


def verified(run, image, name):
    """What the truth says of this name for an image: a tick, or a cross and the true class; nothing if unknown."""
    if run.truth is None or run.truth[image] < 0:
        return ""
    if run.truth[image] == name:
        return TICK
    return f" <i class=no title=wrong>✗ <bdi>{run.name(run.truth[image])}</bdi></i>"


def grid(run, shown, captions):
    """Images of these numbers, with captions."""
    pixels = run.images.pixels[torch.tensor(shown)].cpu()
    side = pixels.shape[-1]
    # Small images are enlarged by a whole number, so that their pixels stay squares of one size.
    kind, width = ("pixels", side * max(1, 112 // side)) if side <= 48 else ("photos", 160)
    figures = []
    for i, picture, caption in zip(shown, pixels, captions):
        name = text(run.images.names[i])
        picture = f'<img src="{data_uri(picture)}" width={width} height={width} alt="{name}" title="{name}">'
        figures.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="grid {kind}">\n' + "\n".join(figures) + "\n</div>"


def data_uri(pixels):
    """uint8 (3, S, S) as an image inside the page: PNG when small, else a JPEG of at most 160 pixels."""
    image, file = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    kind = "png" if max(image.size) <= 48 else "jpeg"
    image.thumbnail((160, 160))
    image.save(file, kind, **(dict(optimize=True) if kind == "png" else dict(quality=85)))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def appendix(config, summary, skipped):
    """Skipped files, settings and versions, folded away."""
    parts = []
    if skipped:
        rows = [[f"<bdi>{text(value)}</bdi>" for value in row.values()] for row in skipped[:LISTED_FILES]]
        more = f"<p>and {len(skipped) - LISTED_FILES:,} more</p>" * (len(skipped) > LISTED_FILES)
        parts.append(folded(count(len(skipped), "skipped file"), table(rows) + more))
    settings = {name: "" if value is None else value for name, value in asdict(config).items()}
    versions = dict(python=platform.python_version(), torch=summary.get("torch", torch.__version__))
    versions.update(torchvision=torchvision.__version__, pillow=PIL.__version__)
    for title, values in (("Settings", settings), ("Versions", versions)):
        parts.append(folded(title, table((text(name), text(value)) for name, value in values.items())))
    title = "Skipped files, settings, versions" if skipped else "Settings, versions"
    return section(title, "The same settings and versions give the same result on the same CPU.", *parts)


# ======================================================================================================================
# How the page looks. The teacher is orange and the student blue throughout, which the colour-blind tell apart.
# ======================================================================================================================

KEY = "<p class=legend><span class=teacher><b></b>teacher</span> <span class=student><b></b>student</span></p>"

CSS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #1c1e21; --muted: #5c636b; --line: #dfe0dc; --soft: #f0f0ec;
  --orange: 170, 60, 0; --blue: 0, 80, 150; --purple: #94479a; --green: #1a7a46; --on-full: #fff; }
@media screen and (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e7e7e4; --muted: #a0a7af;
  --line: #31353a; --soft: #1e2125; --orange: 240, 145, 75; --blue: 95, 165, 235; --purple: #cf92d6; --green: #6fce97;
  --on-full: #101214; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.6rem, 5.5vw, 2.7rem); line-height: 1.15; margin: .4rem 0 .6rem; letter-spacing: -.02em; }
h2 { font-size: 1.3rem; margin: 0 0 .3rem; }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
figure { margin: 0; min-width: 0; }
.lead { max-width: 46rem; margin: 0 0 1.2rem; } section .lead { color: var(--muted); }
.facts, .legend, em, small, figcaption, dt { color: var(--muted); font-style: normal; font-size: .875rem; }
.facts { margin: 0; } .facts span, dd > span { display: inline-block; }
b.teacher, strong { color: rgb(var(--orange)); } b.student { color: rgb(var(--blue)); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.2rem 0 0; }
.tiles div { flex: 1 1 40%; min-width: 0; background: var(--soft); border-radius: .6rem; padding: .7rem .9rem; }
dd { margin: 0; font-size: 1.05rem; font-weight: 600; }
.pair { display: grid; gap: 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }

.chart svg { display: block; width: 100%; } .chart text { font-size: 13px; fill: var(--muted); }
.chart .key { display: inline-block; width: 1rem; margin-right: .35rem; vertical-align: middle; }
.chart path, .chart polyline { fill: none; stroke: var(--line); }
.chart .c0 { stroke: var(--ink); } .chart .c1 { stroke: var(--purple); } .chart .c2 { stroke: var(--green); }
.chart .c0, .chart .c1, .chart .c2 { stroke-width: 2.5; stroke-linejoin: round; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin-top: .3rem; }

table { border-collapse: collapse; width: 100%; font-size: .9rem; } tr + tr { border-top: 1px solid var(--line); }
td, th { padding: .3rem .6rem .3rem 0; vertical-align: top; text-align: left; font-weight: 500; }
small { font-weight: 400; } .classes td { vertical-align: middle; }
details { border-bottom: 1px solid var(--line); } summary { padding: .6rem 0; cursor: pointer; }
details table { margin-bottom: 1rem; table-layout: fixed; } details th { width: 40%; color: var(--muted); }
.classes { table-layout: fixed; } .classes th { vertical-align: middle; width: auto; color: inherit; }
.classes th:first-child { width: 26%; } .classes [scope=col] { font-size: .875rem; color: var(--muted); }
.legend { margin: 0 0 .5rem; } .legend span { margin-right: 1rem; }
.bar { display: flex; align-items: center; gap: .5rem; line-height: 1.25; }
.bar span { position: relative; flex: 1; background: var(--soft); border-radius: 2px; }
.bar b, .legend b { display: block; height: .5rem; border-radius: 2px; background: rgb(var(--orange)); }
.legend b { display: inline-block; width: 1.2rem; margin-right: .4rem; }
.legend .student b, .bar.student b { background: rgb(var(--blue)); }
.bar i { position: absolute; top: -2px; bottom: -2px; width: 2px; margin-left: -1px; background: var(--ink); }
.bar em { flex: 0 0 3.6rem; text-align: right; color: var(--ink); font-size: .8rem; }
.bar em, .matrix td { font-variant-numeric: tabular-nums; }

.scroll { overflow-x: auto; }
.matrix { font-size: .8rem; border-collapse: separate; border-spacing: 1px; }
.matrix td { padding: 0; text-align: center; vertical-align: middle; background: var(--soft); }
.matrix th { padding: 0 .4rem 0 0; background: var(--paper); }
.matrix tr:first-child > :first-child { background: none; }
.numbers td { min-width: 1.65rem; height: 2rem; } .small td { min-width: .8rem; height: 1rem; }
.right { --cell: rgba(var(--blue), var(--v)); } .wrong { --cell: rgba(var(--orange), var(--v)); }
.matrix td[style] { background-image: linear-gradient(var(--cell), var(--cell)); } .full { color: var(--on-full); }
.matrix bdi { display: block; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.matrix [scope=row] { position: sticky; left: 0; width: 1rem; vertical-align: middle; text-align: right; }
.matrix [scope=col] { vertical-align: bottom; padding: 0 0 .3rem; } .matrix [scope=row] bdi { max-width: 7rem; }
.matrix [scope=col] bdi { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 6rem; margin: auto; }
ol { margin: .3rem 0 0; padding-left: 1.8rem; }

.grid { display: grid; gap: 1rem .6rem; grid-template-columns: repeat(3, minmax(0, 1fr)); }
.grid img { display: block; max-width: 100%; height: auto; border-radius: .4rem; background: var(--soft); }
.grid figcaption { margin-top: .3rem; font-size: .8rem; line-height: 1.35; color: var(--ink); }
.grid figcaption > * { display: block; } .grid s { color: var(--muted); } .grid em, .grid small { font-size: inherit; }
.pixels img { image-rendering: pixelated; }
.yes, .no { font-style: normal; } .yes { color: var(--green); } .no { color: rgb(var(--orange)); }
@media (min-width: 36rem) { .tiles div { flex-basis: auto; }
  .grid { grid-template-columns: repeat(6, minmax(0, 1fr)); } }
@media (min-width: 60rem) { .grid { grid-template-columns: repeat(8, minmax(0, 1fr)); } }
@media print { body { max-width: none; font-size: 10pt; padding: 0; } h2, .lead { break-after: avoid; }
  :root { --paper: #fff; } .pair { grid-template-columns: 1fr 1fr; } .grid { grid-template-columns: repeat(8, 1fr); }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } figure, tr, .tiles { break-inside: avoid; } }
"""

# No script may run and nothing may be fetched, whatever a file is called.
PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


# ======================================================================================================================
# The confusion matrices as a picture, for a README or a paper
# ======================================================================================================================


def draw_noise(path, classes, teacher, student):
    """Picture (PNG) at `path`: confusion matrices of two tclip.score()s side by side, as shares of the true class."""
    from matplotlib.figure import Figure

    side = min(4 + 0.18 * len(classes), 20)
    figure = Figure((2 * side + 1, side), layout="compressed")
    names = [str(name) if len(str(name)) <= 32 else f"{str(name)[:31]}…" for name in classes]
    for ax, (name, result) in zip(figure.subplots(1, 2, sharey=True), [("teacher", teacher), ("student", student)]):
        shares = (result["confusion"] / result["confusion"].sum(1, keepdim=True).clamp(min=1)).numpy()
        drawn = ax.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        ax.set_title(f"{name}: {percent(result['accuracy'])} right")
        ax.set_xlabel("predicted")
        if len(classes) <= 50:  # more names than that are a blur
            ax.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
            ax.set_yticks(range(len(classes)), names, parse_math=False)
        if len(classes) <= NUMBER_CLASSES:
            for t, p in zip(*(shares >= 0.005).nonzero()):
                ax.text(p, t, f"{100 * shares[t, p]:.0f}", ha="center", va="center", size=8,
                        color="black" if shares[t, p] > 0.5 else "white")  # fmt: skip
    figure.axes[0].set_ylabel("true class")
    figure.colorbar(drawn, ax=figure.axes, label="share of the true class", fraction=0.03, pad=0.02)
    figure.savefig(path, dpi=120, format="png", bbox_inches="tight")
