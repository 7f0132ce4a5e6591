"""What people bring as text: class names, prompts, another teacher's answers, the truth."""

import csv
import io
import math
import os
import re
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tclip
from tclip import UserError
from tclip_app.images import tell
from tclip_app.names import class_numbers, composed, distinct, plain
from tclip_app.outlook import unsaid


def listed(value, separator=None):
    """Items of a setting: the lines of the text file that it names, or else its parts between separators."""
    parts = value.split(separator) if separator else [value]
    if os.path.isfile(value):
        parts = read_text(value).splitlines()
    items = [composed(part.strip()) for part in parts if part.strip()]
    if not items:
        raise UserError(f"{value} is empty")
    often, times = Counter(items).most_common(1)[0]
    if times > 1:
        raise UserError(f"{often!r} is named {times} times" + f" in {value}" * os.path.isfile(value))
    return items


def read_text(path):
    """A text file of UTF-8, or of UTF-16 with its mark, with its line ends as they are. UserError: it is none."""
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeError as error:
        raise UserError(f"cannot read {path}: save it in UTF-8 (Excel calls that 'CSV UTF-8'): {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def unguarded(cell):
    """A cell as it was before tclip.write_csv() put an apostrophe before what begins like a formula."""
    return cell[1:] if re.match(r"'+[=+\-@\t\r]", cell) else cell


def read_csv(path):
    """Rows of a csv file as dicts of its columns, apostrophes taken away. UserError: it cannot be read.

    What stands between columns is a comma, a semicolon or a tab: Excel takes one of them, by the country.
    """
    text = read_text(path)
    between = max(",;\t", key=text.partition("\n")[0].count)
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=between)
        return [{k: unguarded(v or "") for k, v in row.items() if k is not None} for row in rows]
    except csv.Error as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_labels(path):
    """A csv file with the columns file, label and maybe confidence, or else 1: dict file -> (label, confidence).

    UserError: unreadable, no such columns, no row, a file twice, a confidence outside [0, 1].
    """
    found, rows = {}, read_csv(path)
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise UserError(f"{path} needs a first line file,label or file,label,confidence, and rows below it")
    for number, row in enumerate(rows, 1):
        name, label = composed(row["file"], found), row["label"]
        if not name or not label:
            raise UserError(f"{path}: no file or no label in row {number}")
        if name in found:
            raise UserError(f"{path}: {name} twice, again in row {number}")
        try:
            confidence = float((row.get("confidence") or "1").replace(",", "."))
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
        hint = "; of a data frame save to_numpy(str) and to_numpy(float)" * ("Object arrays" in str(error))
        raise UserError(f"cannot read {path} as an npz file without objects in it: {error}{hint}") from error
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
    check((probs >= 0).all(), "probs are below zero: of logits save the softmax")
    total = probs.sum(1, dtype=np.float64)
    odd = abs(total - 1).argmax()
    wrong = f"probs of {files[odd]} sum to {total[odd]:.3g}, not to 1: of logits save the softmax, of votes the shares"
    check(abs(total[odd] - 1) < 0.05, wrong)
    known, times = np.unique(files, return_counts=True)
    check(len(known) == len(files), f"{known[times.argmax()]} twice")
    probs = torch.from_numpy(probs.astype(np.float32))
    features = None if features is None else F.normalize(torch.from_numpy(features.astype(np.float32)), dim=1)
    names = {}  # composed -> as in the file
    for file in files.tolist():
        names[composed(file, names)] = file
    return list(names), classes.tolist(), probs / probs.sum(1, keepdim=True), features


def class_prior(prior, classes):
    """--class-prior as tclip.class_shares() reads it: "none", "uniform" or numbers in the order of the classes.

    prior: that, or shares by the classes' names, "cat:0.7,dog:0.3", or a file of such pairs, one a line. UserError: a
    class has no share, or two, or one that tclip.class_shares() does not take, or there is no such class.
    """
    if os.path.isfile(prior) or ":" in prior:
        parts = read_text(prior).splitlines() if os.path.isfile(prior) else prior.split(",")
        pairs = [re.fullmatch(r'\s*"?(.+?)"?\s*[:,;\t]\s*([^:,;\t]+)', part) for part in parts if part.strip()]
        if not all(pairs):
            raise UserError(f"--class-prior {prior}: each class needs its name and its share, as in cat:0.7,dog:0.3")
        pairs = [pair.groups() for pair in pairs if pair[2] != "share"]  # but the first line of a csv file
        numbers = class_numbers([name for name, _ in pairs], classes, "--class-prior")
        for i, name in enumerate(classes):
            if numbers.count(i) != 1:
                raise UserError(f"--class-prior {prior}: {name!r} has {numbers.count(i)} shares, and needs one")
        prior = ",".join(share for _, (_, share) in sorted(zip(numbers, pairs)))
    try:
        tclip.class_shares(prior, classes)
    except UserError as error:
        raise UserError(f"{error}, for {', '.join(classes[:20])}; or each with its name, as in cat:0.7") from error
    return prior


def read_pseudo_labels(path, classes=None):
    """Another teacher's answers: (file names, class names, probs float32 (N, C), unit features (N, D) or None).

    path: see read_npz() for .npz, read_labels() for .csv; what a confidence lacks to 1 is spread evenly over the other
    classes. classes: names to put the columns in order of; None: those of the file. UserError: other classes.
    """
    if Path(path).suffix.lower() == ".npz":
        files, own, probs, features = read_npz(path)
        classes = classes or own
        order = class_numbers(classes, own, path)
        if sorted(order) != list(range(len(own))):
            raise UserError(f"{path} has {len(own)} classes, not {len(set(order))}: {', '.join(own)}")
        return files, classes, probs[:, order], features
    found = read_labels(path)
    labels, confidence = zip(*found.values())
    classes = classes or distinct(labels)
    confidence = torch.tensor(confidence)[:, None].clamp_min(1 / len(classes))  # (N, 1): a label is the likeliest class
    mine = F.one_hot(torch.tensor(class_numbers(labels, classes, path)), len(classes))  # (N, C)
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


def tell_unsaid(probs, classes):
    """Tell which classes the teacher never says, in probs (N, C); even rows are undecided and do not count."""
    if sentence := unsaid("the teacher", probs[probs.max(1).values > probs.min(1).values].argmax(1), classes):
        tell(sentence)


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
