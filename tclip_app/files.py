"""Files of a run that are written whole or not at all, folders that can be written in, and students that are read."""

import os
import pickle
from contextlib import suppress
from pathlib import Path

import torch

from tclip import UserError
from tclip_app.networks import build


def write_whole(path, write, mode="wb"):
    """Let write(file) fill a draft, then put it into place at once: `path` is never half-written.

    UserError: it cannot be written; the disk is full, say.
    """
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, mode, encoding="utf-8" if mode == "w" else None) as file:
            write(file)
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def check_folder(folder, remedy=""):
    """UserError: no files can be written in this folder, which need not be there yet."""
    try:
        way = Path(os.path.expanduser(folder))
        if str(way).startswith("~"):
            raise FileNotFoundError("no home")
        way = way.absolute()
        with suppress(FileNotFoundError):
            os.lstat(way)  # an OSError where the name is too long, or a file stands in the way
        there = next(path for path in (way, *way.parents) if path.exists())
        if not os.access(there, os.W_OK):
            raise PermissionError(f"{there} is write-protected")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror or error}{remedy}") from error


def load(path, *keys, optional=()):
    """The dict of these keys that torch.save() wrote, on the CPU; no code in it is run. UserError: it is no such."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # memory holds what is in use
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is cut off, or not of a run of tclip: {str(error)[:80]}") from error
    if not isinstance(content, dict) or content.keys() - set(optional) != set(keys):
        raise UserError(f"{path} is not of a run of tclip")
    return content


def run_folder(path):
    """The folder of a run, where it or a file in it is named."""
    return Path(path).parent if Path(path).is_file() else Path(path)


def model_file(path):
    """The model.pt of a run, where it or the run's folder is named."""
    return Path(path, "model.pt") if Path(path).is_dir() else Path(path)


def load_student(path):
    """(student, class names) of a run's model.pt, on the CPU; no code in it is run. Images are student.size px square.

    path: of model.pt, or of the run's folder. UserError: it is no model.pt.
    """
    model = load_model(path)
    student = build(model["arch"], len(model["classes"]), model["size"])
    student.load_state_dict(model["student"])
    return student.eval(), model["classes"]


def load_model(path):
    """What a model.pt holds, a dict. UserError: it is none."""
    return load(model_file(path), "arch", "size", "classes", "student", optional=["familiarity"])
