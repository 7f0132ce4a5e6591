"""One page, report.html, that shows what a run did to the labels, with the images themselves.

It is made from the files of the run's folder alone. The page holds all that it shows: no script, no font, no link. It
reads on a phone, in the dark and on paper. Pictures are read again from where the run found its images.
"""

import io
import json
import string
from collections import Counter
from contextlib import suppress
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import confusion_matrix
from torchvision.datasets import CIFAR10
from torchvision.transforms import functional as TF

import tclip
from tclip import UserError
from tclip_app import answers, images, outlook
from tclip_app.files import write_whole
from tclip_app.page import arrow, count, data_uri, folded, percent, section, table, text

SHOWN = 24  # images in a grid: its 3, 6 or 8 columns are full
STRANGEST = 12
SAME_KIND = SHOWN // 3  # of them at most so many with the same old and new name
LISTED_CLASSES, LISTED_PAIRS, LISTED_FILES = 16, 12, 50  # in the lists, before the rest is folded or left out


def write_report(folder):
    """Write report.html of the run in this folder, and return its path. UserError: no run has ended there."""
    run, path = Run(Path(folder)), Path(folder, "report.html")
    sections = headline, curves, class_by_class, noise, surest_changes, least_sure, strangest, appendix
    body = "\n".join(section(run) for section in sections)
    template = string.Template(resources.files("tclip_app").joinpath("report.html").read_text(encoding="utf-8"))
    page = template.substitute(title=text(f"tclip: {run.config['dataset']}"), body=body)
    write_whole(path, lambda draft: draft.write(page), "w")
    return path


class Run:
    """What the files of a run say.

    teacher, label, student: numbers of the classes, int (N,), and their confidences sure["teacher"], ..., float (N,).
    truth: int (N,), -1 where unknown.
    """

    def __init__(self, folder):
        files = [folder / name for name in ("config.json", "summary.json", "labels.csv", "metrics.csv")]
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{folder} is no folder of a run that has ended: there is no {missing[0].name}")
        self.config, self.summary = (json.loads(file.read_text(encoding="utf-8")) for file in files[:2])
        self.rows, self.history = map(answers.read_csv, files[2:])
        self.skipped = answers.read_csv(folder / "skipped.csv") if (folder / "skipped.csv").exists() else []
        self.classes, self.folder = list(self.summary["unlabeled_student_per_class"]), folder
        number = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
        self.teacher, self.label, self.student, self.truth = (
            np.array([number[name] for name in columns.get(column, [""] * len(self.rows))])
            for column in ("teacher_label", "label", "student_label", "truth")
        )
        self.sure = {who: np.array(columns[f"{who}confidence"], float) for who in ("teacher_", "", "student_")}
        self.familiar = np.array(columns["familiar"], float) if "familiar" in columns else None  # a run of tclip.py
        self.known = self.truth >= 0
        self.right = self.summary["unlabeled_teacher_per_class"], self.summary["unlabeled_student_per_class"]

    def name(self, number):
        """Name of a class, ready for the page."""
        return f"<bdi>{text(self.classes[number], limit=48)}</bdi>"

    def pictures(self, shown):
        """The upright images of these rows, None where one is gone."""
        root, names = Path(self.config["root"]), [self.rows[i]["file"] for i in shown]
        if "classes" in self.config:  # a folder of images
            try:
                files = images.find(root)
            except UserError:
                files = {}
            with images.quiet():
                read = [images.read_image(files[name], root) if name in files else None for name in names]
            return [None if isinstance(image, str) else image for image in read]
        source = []
        if self.config["dataset"] == "digits":
            source = tclip.handwritten_digits(train=True)
        elif self.config["dataset"] == "cifar10":
            with suppress(RuntimeError):  # it is not there: a report downloads nothing
                source = CIFAR10(root)
        where = {f"{number:05d}": i for i, number in enumerate(getattr(source, "indices", range(len(source))))}
        return [source[where[name]][0] if name in where else None for name in names]


# ---- The sections, in the order of the page --------------------------------------------------------------------------
def headline(run):
    """The result in plain words, and what it is the result of."""
    total, summary, config = len(run.rows), run.summary, run.config
    changed, confidence = (run.label != run.teacher).mean(), run.sure["student_"].mean()
    tiles = [("labels changed", percent(changed)), ("student’s mean confidence", percent(confidence))]
    if not run.known.any():
        title = f"Student and teacher agree on <b>{percent(summary['agreement'])}</b> of {count(total, 'image')}"
        lead = f"{text(summary.get('outlook', ''), limit=400)} {NO_TRUTH}"
    else:
        before, after = (summary[f"unlabeled_{who}_accuracy"] for who in ("teacher", "student"))
        title = f"Teacher <b class=teacher>{percent(before)}</b> → student <b class=student>{percent(after)}</b> right"
        some = f", of which the true class of {run.known.sum():,} is known" * (not all(run.known))
        lead = f"on the {count(total, 'unlabeled image')}{some}. {verdict(before, after)}"
        worst = [min((a, c) for c, a in enumerate(of.values()) if a is not None) for of in run.right]
        tiles.insert(0, ("worst class", arrow(f"{percent(a)} <small>{run.name(c)}</small>" for a, c in worst)))
        tiles.insert(0, ("labels right", percent(summary["unlabeled_label_accuracy"])))
        heldout = [summary.get(f"heldout_{who}_accuracy") for who in ("teacher", "student")]
        if heldout[1] is not None:
            tiles.insert(0, ("held-out images", arrow(map(percent, heldout))))
    numbers = (torch.from_numpy(said) for said in (run.teacher, run.label, run.student))
    for warning in outlook.warnings(*numbers, run.classes):
        lead += f" <strong><bdi>{text(warning, limit=400)}</bdi>.</strong>"
    facts = [text(config["dataset"]), count(total, "image"), count(len(run.classes), "class")]
    facts += [f"{count(len(run.skipped), 'file')} skipped"] * bool(run.skipped)
    facts += [f"teacher {text(Path(config.get('pseudo_labels') or config['clip']).name)}"]
    facts += [f"{count(round(summary['seconds']), 'second')} on {text(summary['device'])}"]
    facts = " · ".join(f"<span>{fact}</span>" for fact in facts)
    tiles = "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles)
    title = f"<p class=facts>{facts}</p>\n<h1>{title}</h1>\n<p class=lead>{lead}</p>"
    return f"<header>\n{title}\n<dl class=tiles>\n{tiles}\n</dl>\n</header>"


NO_TRUTH = """Agreement is not accuracy: it says how often the student kept its teacher’s name, not which of the two is
right. No true class is known here; the images below are there for your own judgement."""


def verdict(before, after):
    """One sentence that compares two accuracies, also where the second is the worse."""
    if after < before:
        return "The student ended <strong>below its teacher</strong>: these labels and settings did not help it."
    if after == before:
        return "The student is as often right as its teacher."
    fewer = percent((after - before) / (1 - before), 0)
    return f"The student makes {fewer} fewer mistakes than the teacher it learned from."


def curves(run):
    """Losses, changed labels and the exponents of their rule over the epochs."""
    figure, captions = Figure((11, 2.8), layout="constrained"), []
    epochs = [int(row["epoch"]) for row in run.history]
    kinds = ["loss", "classification", "contrastive"], ["labels_changed", "trust", "sharpness"]
    for ax, columns in zip(figure.subplots(1, 2), kinds):
        for column in columns:
            values, name = [float(row[column]) for row in run.history], column.replace("_", " ")
            ax.plot(epochs, values, marker="." if len(epochs) == 1 else None, label=name)
            captions.append(f"{name} {values[0]:.3g} → {values[-1]:.3g}")
        ax.set(xlabel="epoch", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend()
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict(Date=None))
    lead = (
        "The losses should fall, the labels move, then settle. Trust and sharpness: what teacher and neighbours count."
    )
    caption = ", ".join(captions)
    picture = f'<img class=wide src="{data_uri(file.getvalue(), "svg+xml")}" alt="{caption}">'
    return section("How the training went", lead, f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")


def class_by_class(run):
    """How often teacher and student say each class, and how often they are right about it. The worst come first."""
    classes, known, every = range(len(run.classes)), bool(run.known.any()), bool(run.known.all())
    said = [np.bincount(names, minlength=len(classes)) / len(names) for names in (run.teacher, run.student)]
    true = np.bincount(run.truth[run.known], minlength=len(classes)) / len(run.truth)
    longest, right = max(map(max, (*said, true))), [list(of.values()) for of in run.right]
    lead = "For each class: the share of all images that is called so"
    if known:
        order = sorted(classes, key=lambda c: (right[1][c] is None, right[1][c]))
        lead += ", with a mark where it should be" * every + ", and how many of its own images are named "
        lead += "right. The student’s worst class comes first."
    else:
        order = sorted(classes, key=lambda c: -round(abs(said[0][c] - said[1][c]), 9))
        lead += ". Where the student differs most comes first."
    rows = []
    for c in order:
        cells = [bars([shares[c] for shares in said], longest, true[c] if every else None)]
        cells += [bars([shares[c] for shares in right], 1)] if known else []
        rows.append(f"<tr><th scope=row>{run.name(c)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<tr><th scope=col>class<th scope=col>share of images" + "<th scope=col>named right" * known
    parts = [part for part in (rows[:LISTED_CLASSES], rows[LISTED_CLASSES:]) if part]
    tables = [f"<table class=classes>{head}{''.join(part)}</table>" for part in parts]
    tables[1:] = [folded(f"{count(len(parts[1]), 'more class')}", rest) for rest in tables[1:]]
    key = "<p class=legend><span class=teacher><b></b>teacher</span> <span class=student><b></b>student</span></p>"
    return section("Class by class", lead, key, *tables)


def bars(shares, top, mark=None):
    """Two bars with their numbers, teacher above student. top: the share that fills the width."""
    tick = "" if mark is None else f'<i style="left:{100 * mark / top:.1f}%"></i>'
    return "".join(
        f'<div class="bar {who}"><span><b style="width:{100 * (share or 0) / top:.1f}%"></b>{tick}</span>'
        f"<em>{percent(share)}</em></div>"
        for who, share in zip(("teacher", "student"), shares)
    )


def noise(run):
    """The confusions of teacher and student; without truth, what the student calls the teacher's classes."""
    if not run.known.any():
        pairs = pair_list(run, "From the teacher’s names to the student’s", run.teacher, run.student, "now called")
        return section("What the teacher called x is now called y", "The most frequent new names.", pairs)
    lead = "A row is a true class: the names its images are given, in % of them. Below are the most frequent mistakes."
    picture = run.folder / "noise.png"
    content = data_uri(picture.read_bytes(), "png") if picture.exists() else ""
    image = f'<img class=wide src="{content}" alt="confusion matrices of teacher and student">' if content else ""
    truth, said = run.truth[run.known], dict(Teacher=run.teacher[run.known], Student=run.student[run.known])
    lists = [pair_list(run, who, truth, names, "called") for who, names in said.items()]
    return section("The noise, before and after", lead, image, f"<div class=pair>{''.join(lists)}</div>")


def pair_list(run, caption, before, after, called):
    """Of two names of each image the most frequent pairs that differ, as a list."""
    cells = confusion_matrix(before, after, labels=range(len(run.classes)))
    totals, beside, items = cells.sum(1), cells - np.diag(np.diag(cells)), []
    for cell in (-beside).argsort(axis=None, kind="stable")[:LISTED_PAIRS]:
        r, c = divmod(int(cell), len(cells))
        if beside[r, c]:
            share = f"{count(int(beside[r, c]), 'image')}, {percent(beside[r, c] / totals[r], 0)}"
            items.append(f"<li>{run.name(r)} {called} {run.name(c)} <em>{share}</em></li>")
    return f"<figure><figcaption>{caption}</figcaption><ol>{''.join(items) or '<li>None.</li>'}</ol></figure>"


def surest_changes(run):
    """The images whose ensemble label differs from the teacher's and is surest."""
    changed, shown, kinds = np.flatnonzero(run.label != run.teacher), [], Counter()
    if not len(changed):
        return section("Surest changes", "No label changed: every image ends with the name its teacher gave.")
    for i in changed[np.argsort(-run.sure[""][changed], kind="stable")].tolist():
        kinds[run.teacher[i], run.label[i]] += 1
        if kinds[run.teacher[i], run.label[i]] <= SAME_KIND and len(shown) < SHOWN:
            shown.append(i)
    lead = f"{count(len(changed), 'image')} ended with another label than the teacher’s. These are the surest, at most "
    lead += f"{SAME_KIND} of one kind: the teacher’s name, the new one, and how sure the label is."
    captions = [
        f"<s>{run.name(run.teacher[i])}</s><b>{run.name(run.label[i])}</b>"
        f"<em>{percent(run.sure[''][i], 0)}{verified(run, i, run.label[i])}</em>"
        for i in shown
    ]
    return section("Surest changes", lead, grid(run, shown, captions))


def least_sure(run):
    """The images that the student is least sure of."""
    shown = np.argsort(run.sure["student_"], kind="stable")[:SHOWN].tolist()
    lead = "To label a few images by hand begin here: the student’s name, how sure it is, and the teacher’s name."
    return section("Where the student is least sure", lead, grid(run, shown, judgements(run, shown)))


def strangest(run):
    """The images that are least typical of the class that the student gives them; nothing where that is not known."""
    if run.familiar is None:
        return ""
    shown = np.argsort(run.familiar, kind="stable")[:STRANGEST].tolist()
    lead = "To find images of no class begin here: these are the least typical of what the student calls them."
    return section("Strangest images", lead, grid(run, shown, judgements(run, shown)))


def judgements(run, shown):
    """Captions: what the student says and how sure it is, what the teacher says, and what is true."""
    return [
        f"<b>{run.name(run.student[i])} <small>{percent(run.sure['student_'][i], 0)}</small></b>"
        f"<span>teacher: {run.name(run.teacher[i])}</span><em>{verified(run, i, run.student[i])}</em>"
        for i in shown
    ]


def verified(run, image, name):
    """What the truth says of this name for an image: a tick, or a cross and the true class; nothing if unknown."""
    if not run.known[image]:
        return ""
    if run.truth[image] == name:
        return " <i class=yes title=right>✓</i>"
    return f" <i class=no title=wrong>✗ {run.name(run.truth[image])}</i>"


def grid(run, shown, captions):
    """The images of these rows, with captions; where they are gone, the captions alone."""
    pictures = run.pictures(shown)
    small = all(min(picture.size) <= 48 for picture in pictures if picture)  # their pixels stay squares of one size
    figures = []
    for i, picture, caption in zip(shown, pictures, captions):
        name, shape, file = text(run.rows[i]["file"]), "", io.BytesIO()
        if picture:
            side = min(*picture.size, 160)
            width = side * max(1, 112 // side) if small else 160
            image = TF.to_pil_image(tclip.square(picture, side))
            image.save(file, "png" if small else "jpeg", **(dict(optimize=True) if small else dict(quality=85)))
            uri = data_uri(file.getvalue(), "png" if small else "jpeg")
            shape = f'<img src="{uri}" width={width} height={width} alt="{name}" title="{name}">'
        shape = shape or f"<small><bdi>{name}</bdi></small>"
        figures.append(f"<figure>{shape}<figcaption>{caption}</figcaption></figure>")
    gone = "<p class=lead>Some images are no longer where the run found them.</p>" * (None in pictures)
    return f'{gone}<div class="grid {"pixels" if small else "photos"}">\n' + "\n".join(figures) + "\n</div>"


def appendix(run):
    """Skipped files, settings and versions, folded away."""
    parts = []
    if run.skipped:
        more = f"<p>and {len(run.skipped) - LISTED_FILES:,} more</p>" * (len(run.skipped) > LISTED_FILES)
        rows = [(row["file"], row["reason"]) for row in run.skipped[:LISTED_FILES]]
        parts.append(folded(count(len(run.skipped), "skipped file"), table(rows) + more))
    settings = run.config | dict(torch=run.summary["torch"])
    parts.append(folded("Settings", table((name, "" if value is None else value) for name, value in settings.items())))
    return section("Settings", "The same settings and versions give the same result on the same CPU.", *parts)
