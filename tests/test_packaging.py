"""tclip.py alone in an empty folder, its parts copied out as text, and what the packaging files promise."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import torch
from conftest import ROOT, coloured, rows_of, settings, write_cifar10

import tclip

SOURCE = (ROOT / "tclip.py").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUP = """
import os, runpy, sys, open_clip, torchvision  # a small CLIP, and small files in place of a download
open_clip.add_model_config({json!r})
torchvision.datasets.cifar.check_integrity = lambda *_: True
sys.argv = ["tclip.py", *sys.argv[1:]]
runpy.run_path("tclip.py", run_name="__main__")
"""


def test_alone(tmp_path, tiny_clip):
    """The only file of an empty folder: --dataset cifar10 runs end to end, by the classes of torchvision and open_clip,
    on few images and a small CLIP. On the digits it says in one line which file it lacks."""

    def call(*arguments):
        command = [sys.executable, "-P", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=300)

    (tmp_path / "empty").mkdir()
    shutil.copy(ROOT / "tclip.py", tmp_path / "empty")
    done = call("tclip.py")
    assert done.returncode == 1 and re.fullmatch(".*offline_clip.pt.*\n", done.stderr) and not done.stdout
    write_cifar10(tmp_path, 200)
    (tmp_path / "setup.py").write_text(SETUP.format(json=str(tmp_path / "tiny.json")))
    flags = "--dataset cifar10 --arch resnet8 --epochs 1 --device cpu --cache".split()
    done = call(tmp_path / "setup.py", *flags, tmp_path / "cache", "--root", tmp_path, "--clip", tiny_clip)
    assert done.returncode == 0 and "see runs/cifar10" in done.stdout, done.stderr
    assert len(rows_of(tmp_path / "empty/runs/cifar10/labels.csv")) == 200


def test_requirements():
    """Each package that is imported is asked for, or comes with one that is; tclip.py imports nothing of ours."""
    project, extras, packages = PROJECT["project"], PROJECT["project"]["optional-dependencies"], {}
    assert set(PROJECT["tool"]["setuptools"]["package-data"]["tclip_app"]) >= {"offline_clip.pt", "report.html"}
    for file in (ROOT / "tclip.py", *(ROOT / "tclip_app").glob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        packages[file.name] = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert not packages["tclip.py"] & {"tclip", "tclip_app"}
    known = dict(open_clip="open_clip_torch", sklearn="scikit-learn", PIL="pillow", numpy="torchvision")
    used = {known.get(name, name) for name in set().union(*packages.values())}
    asked = {re.split("[=<>]", entry)[0] for entry in project["dependencies"] + extras["export"]}
    assert used <= asked | {"clip", "tclip", "tclip_app"}, used - asked  # (`clip` is done without)


def test_sources():
    """At most 750 lines; no package index and no path of a machine in any text but the tests, which look for them."""
    assert SOURCE.count("\n") <= 750
    machine = re.compile(r"/(?:home|root|Users|work)/\w|index-url|pypi\.org|/simple/")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    for file in [ROOT / name for name in listed if re.search(r"\.(py|md|toml|yml|cff|ipynb)$", name)]:
        if file.exists() and file.parent != Path(__file__).parent:
            assert not machine.findall(file.read_text()), file


def copied(first, last, imports="import torch\nimport torch.nn.functional as F"):
    """The text of tclip.py from one heading up to another, run elsewhere after these imports alone."""
    space = {"__name__": "elsewhere"}
    exec(imports + "\n" + re.search(rf"# ==== {first}.*?(?=# ==== {last})", SOURCE, re.S).group(), space)
    return space


def test_copies():
    """Pseudo-labels, contrastive loss and labels work in another project with torch alone; training, with the sections
    that it needs, gives what it gives here."""
    (_, probs, features), results = coloured(12), []
    for where in (copied("Pseudo-labels", "Augmentation"), vars(tclip)):
        torch.manual_seed(0)
        texts = where["text_classifier"](lambda texts: features[: len(texts)], ["cat", "horse"], ["{}", "a {}"])
        labels = where["EnsembleLabels"](probs, features, neighbours=2, class_prior=torch.full((3,), 1 / 3))
        labels.record(torch.arange(12), probs.roll(1, 0), features)
        labels.end_epoch()
        loss = where["class_conditional_contrastive_loss"](features, probs[:6])
        results.append([where["zero_shot_probs"](features, texts), loss, labels.table])
    assert all(map(torch.equal, *results)) and not torch.equal(labels.table.float(), probs)

    imports = SOURCE[SOURCE.index("import csv") : SOURCE.index("# ==== Settings")]
    student, labels = copied("Pseudo-labels", "Evaluation", imports)["train"](settings(epochs=2), *coloured())
    expected, table = tclip.train(settings(epochs=2), *coloured())
    assert torch.equal(labels.table, table.table)
    assert all(map(torch.equal, student.state_dict().values(), expected.state_dict().values()))
