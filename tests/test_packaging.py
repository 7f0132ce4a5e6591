"""Packaging: the two ways to install agree, the import is light, and the method can be copied out alone."""

import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tclip

ROOT = Path(__file__).resolve().parents[1]
OPENAI_CLIP = "git+https://github.com/openai/CLIP.git@d05afc436d78f1c48dc0dbf8e5980a9d471f35f6"


@pytest.fixture(scope="module")
def pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def environment():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def test_environment(pyproject, environment):
    """conda's file asks for what pyproject.toml asks for, the tutorials' needs, and OpenAI's CLIP at one commit."""
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    project = pyproject["project"]
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip", "git"}
    assert sorted(pip) == sorted(
        project["dependencies"] + project["optional-dependencies"]["tutorials"] + [OPENAI_CLIP]
    )


def test_python_version(pyproject, environment):
    """conda's Python is one that pyproject.toml allows."""
    specifiers = pytest.importorskip("packaging.specifiers")
    (python,) = (entry for entry in environment["dependencies"] if str(entry).startswith("python="))
    assert python.removeprefix("python=") in specifiers.SpecifierSet(pyproject["project"]["requires-python"])


def test_imports_are_declared(pyproject):
    """Every package that the modules import is a requirement, comes with one, or with Python."""
    modules = pyproject["tool"]["setuptools"]["py-modules"]
    sources = "\n".join((ROOT / f"{module}.py").read_text() for module in modules)
    names = set(re.findall(r"^\s*(?:import|from) (\w+)", sources, re.M)) - set(modules)
    asked = {re.split("[=<>]", entry)[0] for entry in pyproject["project"]["dependencies"]}
    known = dict(open_clip="open_clip_torch", sklearn="scikit-learn", PIL="pillow", numpy="torchvision")
    optional = {"clip", "onnxscript", "safetensors"}  # done without, or asked for with [export]
    foreign = {known.get(name, name) for name in names - optional if name not in sys.stdlib_module_names}
    assert foreign <= asked, foreign - asked


def test_module_is_packed(pyproject):
    """The wheel holds each module, the command `tclip` is tclip.main(), the offline CLIP is packed or beside it."""
    assert set(pyproject["tool"]["setuptools"]["py-modules"]) == {file.stem for file in ROOT.glob("*.py")}
    assert pyproject["project"]["scripts"]["tclip"] == "tclip:main" and callable(tclip.main)
    packed = [file for files in pyproject["tool"]["setuptools"].get("data-files", {}).values() for file in files]
    assert all((ROOT / file).is_file() for file in packed) and tclip.OFFLINE_CLIP.is_file()
    assert (ROOT / pyproject["project"]["readme"]).is_file()
    assert all((ROOT / file).is_file() for file in pyproject["project"]["license-files"])


def test_light_import():
    """`import tclip` loads none of the slow packages that only some of it needs."""
    heavy = {"torchvision", "sklearn", "matplotlib", "open_clip", "clip", "scipy", "timm"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tclip; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tclip" in done.stdout.split() and not heavy & set(done.stdout.split())


def copied(*names):
    """The sources of these names of tclip, executed where there is nothing but torch and math."""
    namespace = dict(torch=torch, F=F, nn=nn, math=math, Tensor=Tensor)
    for name in names:
        exec(inspect.getsource(getattr(tclip, name)), namespace)
    return [namespace[name] for name in names]


def test_copies_of_the_pseudo_labels():
    """The zero-shot functions can be copied into another project."""
    zero_shot_probs, text_classifier = copied("zero_shot_probs", "text_classifier")

    class Teacher:
        encode_texts = staticmethod(lambda texts: torch.tensor([[len(text), 1.0] for text in texts]))

    weights = text_classifier(Teacher, ["cat", "horse"], ["{}", "a {}"])
    assert torch.equal(weights, tclip.text_classifier(Teacher, ["cat", "horse"], ["{}", "a {}"]))
    assert zero_shot_probs(torch.eye(2), weights).shape == (2, 2)


def test_copy_of_the_loss():
    """The contrastive loss can be copied into another project."""
    (loss,) = copied("class_conditional_contrastive_loss")
    z, targets = F.normalize(torch.rand(8, 3), dim=1), torch.rand(4, 3).softmax(1)
    assert torch.equal(loss(z, targets), tclip.class_conditional_contrastive_loss(z, targets))


def test_copy_of_the_labels():
    """The ensemble labels, with the five functions above them, can be copied into another project."""
    *_, EnsembleLabels = copied("everyone", "total", "balance", "neighbour_mean", "consensus", "EnsembleLabels")
    probs = torch.rand(6, 3).softmax(1)
    tables = []
    for kind in (EnsembleLabels, tclip.EnsembleLabels):
        labels = kind(probs, neighbours=2)
        labels.record(torch.arange(6), probs.roll(1, 0), F.normalize(probs, dim=1))
        labels.end_epoch()
        tables.append(labels.table)
    assert torch.equal(*tables) and not torch.equal(tables[0], probs)
