"""What people bring as text: class names, prompts, another teacher's answers, the truth."""

import csv
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tclip import UserError
from tclip_app.images import tell


def listed(value, separator=None):
    """Items of a setting: the lines of the text file that it names, or else its parts between separators."""
    parts = value.split(separator) if separator else [value]
    if os.path.isfile(value):
        parts = read_text(value).splitlines()
    items = [part.strip() for part in parts if part.strip()]
    if not items or len(set(items)) < len(items):
        raise UserError(f"{value} {'names something twice' if items else 'is empty'}")
    return items


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # "-sig": spreadsheets put a mark in front
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def unguarded(cell):
    """A cell as it was before tclip.write_csv() put an apostrophe before what begins like a formula."""
    return cell[1:] if re.match(r"'+[=+\-@\t\r]", cell) else cell


def read_csv(path):
    """Rows of a csv file as dicts of its columns, apostrophes taken away. UserError: it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [{k: unguarded(v or "") for k, v in row.items() if k is not None} for row in csv.DictReader(file)]
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_labels(path):
    """A csv file with the columns file, label and maybe confidence: dict file -> (label, confidence or 1).

    UserError: unreadable, no such columns, no row, a file twice, a confidence outside [0, 1].
    """
    found, rows = {}, read_csv(path)
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise UserError(f"{path} needs a first line file,label or file,label,confidence, and rows below it")
    for number, row in enumerate(rows, 1):
        name, label = row["file"], row["label"]
        if not name or not label:
            raise UserError(f"{path}: no file or no label in row {number}")
        if name in found:
            raise UserError(f"{path}: {name} twice, again in row {number}")
        try:
            confidence = float(row.get("confidence") or 1)
        except ValueError:
            confidence = math.nan
        if not 0 <= confidence <= 1:
            raise UserError(f"{path}: the confidence of {name} is not within 0 and 1")
        found[name] = label, confidence
    return found


def read_npz(path):
    """(files, classes, probs float32 (N, C), features float32 (N, D) or None) of an npz file of these arrays.

    UserError: one is missing or wrong.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("files", "classes", "probs", "features") if name in data}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} as an npz file without objects in it: {error}") from error
    if missing := {"files", "classes", "probs"} - arrays.keys():
        raise UserError(f"{path} has no {min(missing)}: it needs files, classes and probs")
    files, classes, probs, features = *(arrays[k] for k in ("files", "classes", "probs")), arrays.get("features")

    def check(right, wrong):
        if not right:
            raise UserError(f"{path}: {wrong}")

    texts = all(names.dtype.kind == "U" and names.ndim == 1 for names in (files, classes))
    check(texts, "files and classes must be lists of strings")
    for name, table in dict(probs=probs, features=features).items():
        if table is not None:
            check(table.dtype.kind in "fiu" and table.ndim == 2 and np.isfinite(table).all(), f"{name} are no numbers")
            check(len(table) == len(files) > 0, f"{name} are {table.shape}, for {len(files)} files")
    check(probs.shape[1] == len(classes), f"probs are {probs.shape}, for {len(classes)} classes")
    check((probs >= 0).all() and (probs.sum(1) > 0).all(), "probs are below zero, or all zero for an image")
    known, times = np.unique(files, return_counts=True)
    check(len(known) == len(files), f"{known[times.argmax()]} twice")
    probs = torch.from_numpy(probs.astype(np.float32))
    features = None if features is None else F.normalize(torch.from_numpy(features.astype(np.float32)), dim=1)
    return files.tolist(), classes.tolist(), probs / probs.sum(1, keepdim=True), features


def plain(name):
    """A class name without what differs from list to list: capitals, underscores, spaces around it."""
    return name.casefold().replace("_", " ").strip()


def class_numbers(labels, classes, path):
    """The labels as numbers of their classes, names compared as plain(). UserError: one is no class."""
    numbers = {plain(name): i for i, name in enumerate(classes)}
    if len(numbers) < max(2, len(classes)):
        raise UserError(f"{path}: two classes are needed at least, and none twice: {', '.join(classes)}")
    for label in labels:
        if plain(label) not in numbers:
            raise UserError(f"{path}: {label!r} is not among the classes {', '.join(classes[:20])}")
    return [numbers[plain(label)] for label in labels]


def read_pseudo_labels(path, classes=None):
    """Another teacher's answers: (file names, class names, probs float32 (N, C), unit features (N, D) or None).

    path: see read_npz() for .npz, read_labels() for .csv; what a confidence lacks to 1 is spread evenly over the other
    classes. classes: names to put the columns in order of; None: those of the file. UserError: other classes.
    """
    if Path(path).suffix == ".npz":
        files, own, probs, features = read_npz(path)
        classes = classes or own
        order = class_numbers(classes, own, path)
        if sorted(order) != list(range(len(own))):
            raise UserError(f"{path} has {len(own)} classes, not {len(set(order))}: {', '.join(own)}")
        return files, classes, probs[:, order], features
    found = read_labels(path)
    labels, confidence = zip(*found.values())
    classes = classes or sorted(set(labels))
    mine = F.one_hot(torch.tensor(class_numbers(labels, classes, path)), len(classes))
    confidence = torch.tensor(confidence)[:, None].clamp_min(1 / len(classes))  # (N, 1): a label is the likeliest class
    return list(found), classes, mine * confidence + (1 - mine) * (1 - confidence) / (len(classes) - 1), None


def match(names, files, probs, features=None):
    """The rows of probs (M, C) and features (M, D) that belong to `names`, by the M file names: (N, C) and (N, D).

    An image without a pseudo-label starts with even probs and with features that are zero.
    """
    row = {file: i for i, file in enumerate(files)}
    missing = [name for name in names if name not in row]
    if len(missing) == len(names):
        raise UserError(f"none of the {len(names)} images has a pseudo-label: {names[0]} is not like {files[0]}")
    if missing:
        tell(f"{len(missing)} of {len(names)} images have no pseudo-label, such as {missing[0]}: they start undecided")
    known = set(names)
    if others := [file for file in files if file not in known]:
        tell(f"{len(others)} pseudo-labels are of other files, such as {others[0]}")
    index = [row.get(name, len(files)) for name in names]  # the last row is for those without
    probs = torch.cat([probs, probs.new_full((1, probs.shape[1]), 1 / probs.shape[1])])[index]
    return probs, None if features is None else torch.cat([features, torch.zeros_like(features[:1])])[index]


def read_truth(truth, names, classes, flag="--truth"):
    """Class numbers (N,) of the images `names`, int64, -1 where unknown.

    truth: a csv file (file,label), or "folders", where images lie in folders named like the classes; None: all unknown.
    """
    labels = {}
    if truth == "folders":
        known = {plain(name) for name in classes}
        labels = {name: own for name in names if plain(own := Path(name).parent.name) in known}
    elif truth:
        labels = {name: label for name, (label, _) in read_labels(truth).items()}
    numbers = dict(zip(labels, class_numbers(labels.values(), classes, truth)))
    there = len(numbers.keys() & set(names))
    if truth and not there:
        raise UserError(f"{flag} {truth} tells nothing of the {len(names)} files, such as {names[0]}")
    if truth and there < len(names):
        tell(f"{flag} {truth} knows {there} of {len(names)} files")
    return torch.tensor([numbers.get(name, -1) for name in names])
