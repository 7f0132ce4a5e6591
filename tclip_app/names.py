"""Names of files and classes, and how they are compared: people and systems spell the same name in several ways."""

import unicodedata
from collections import Counter

from tclip import UserError


def composed(name, taken=()):
    """A name with its accents in one character each (NFC): macOS writes them in two. As it is where that is taken."""
    short = unicodedata.normalize("NFC", name)
    return name if short in taken else short


def plain(name):
    """A class name without what differs from list to list: capitals, underscores, spaces around it, split accents."""
    return composed(composed(name).casefold().replace("_", " ").strip())


def distinct(labels):
    """The class names among labels, sorted: of spellings that are plain() the same, the most frequent one."""
    frequent = Counter(composed(label).strip() for label in labels).most_common()
    return sorted({plain(name): name for name, _ in reversed(frequent)}.values())


def class_numbers(labels, classes, path):
    """The labels as numbers of their classes, names compared as plain(). UserError: one is no class."""
    if len(classes) < 2:
        raise UserError(f"{path}: two classes are needed at least, not {', '.join(classes)}")
    numbers = {}
    for i, name in enumerate(classes):
        if numbers.setdefault(plain(name), i) != i:
            raise UserError(f"{path}: two classes have the same name, {classes[numbers[plain(name)]]!r} and {name!r}")
    for label in labels:
        if plain(label) not in numbers:
            raise UserError(f"{path}: {label!r} is not among the classes {', '.join(classes[:20])}")
    return [numbers[plain(label)] for label in labels]
