"""What the tests share: tclip of this checkout, a working `import clip`, tiny images, and the reference data."""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are so small that more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that are called as a user calls them


def mend_pkg_resources():
    """clip-anytorch reads `pkg_resources.packaging`, which new setuptools have no more: lay a stand-in."""
    try:
        pkg_resources = importlib.import_module("pkg_resources")
    except ImportError:
        pkg_resources = sys.modules["pkg_resources"] = types.ModuleType("pkg_resources")
    if not hasattr(pkg_resources, "packaging"):
        importlib.import_module("packaging.version")
        pkg_resources.packaging = importlib.import_module("packaging")


mend_pkg_resources()


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Tests write to no real home: tclip's cache of features and every download go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("home"))
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, folder)
        yield folder


@pytest.fixture(params=["clip", "open_clip"])
def clip_package(request, monkeypatch):
    """Run the test twice: with the package `clip`, and without it, when tclip falls back on open_clip."""
    if request.param == "clip":
        if not hasattr(pytest.importorskip("clip", reason="no package clip", exc_type=ImportError), "tokenize"):
            pytest.skip("the installed package clip is not OpenAI's")
    else:
        pytest.importorskip("open_clip", reason="no open_clip")
        monkeypatch.setitem(sys.modules, "clip", None)  # `import clip` now raises ImportError
    return request.param


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network (every proxy is a closed port), and an empty home folder without downloads of earlier days."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture(scope="module")
def reference():
    """reference("eurosat.zip") is the path of a file of the public reference data; without it the test is skipped."""
    folder = Path(os.environ.get("TCLIP_DATA") or ROOT.parent / "shared" / "data")

    def find(name):
        if not (folder / name).is_file():
            pytest.skip(f"no reference data: {name} is not in {folder} (the variable TCLIP_DATA names the folder)")
        return folder / name

    return find
