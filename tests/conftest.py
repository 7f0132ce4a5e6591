"""What the tests share: tclip of this checkout, a working `import clip`, tiny images, and the reference data."""

import atexit
import csv
import json
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import packaging.version
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks here are so small that more threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that are called as a user calls them
sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)  # all that clip-anytorch wants of it


def coloured(n=37, classes=3, size=8):
    """A tiny data set: noise in which class c is a little brighter in channel c; what a teacher says, mostly right; and
    its unit features. uint8 (n, 3, size, size), float32 (n, classes), float32 (n, 6). Class of image i: i % classes."""
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 160, (n, 3, size, size), generator=generator), torch.arange(n) % classes
    pixels[torch.arange(n), labels] += 80
    features = torch.randn(n, 6, generator=generator) + 2 * F.one_hot(labels, 6)
    logits = torch.randn(n, classes, generator=generator) + 2 * F.one_hot(labels, classes)
    return pixels.byte(), logits.softmax(1), F.normalize(features, dim=1)


def settings(**changes):
    """Config of a tiny run on these."""
    from tclip import Config

    values = dict(size=8, arch="resnet8", views="writing", epochs=4, batch_size=16, label_neighbours=3, device="cpu")
    return Config(**values | changes)


def write_cifar10(root, n=20):
    """Files of torchvision's CIFAR10 with n training and n test images of noise, for torchvision.datasets.CIFAR10 once
    its check of the files' sums is off. Label of image i: i % 10."""
    folder, rng = root / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=[str(c) for c in range(10)])))
    for i, part in enumerate([*np.array_split(np.arange(n), 5), np.arange(n)]):
        pixels = rng.integers(0, 256, (len(part), 3072), np.uint8)
        name = f"data_batch_{i + 1}" if i < 5 else "test_batch"
        (folder / name).write_bytes(pickle.dumps(dict(data=pixels, labels=(part % 10).tolist())))


@pytest.fixture
def tiny_clip(tmp_path):
    """The name of a CLIP of open_clip with random weights, "tiny:FILE"; tiny.json beside FILE is its architecture."""
    open_clip = pytest.importorskip("open_clip")
    vision = dict(image_size=32, layers=1, width=64, head_width=32, patch_size=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    (tmp_path / "tiny.json").write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny").state_dict(), tmp_path / "tiny.pt")
    return f"tiny:{tmp_path / 'tiny.pt'}"


NAMES = [  # each is a file system's idea of a name
    "=SUM(A1)", "+1", "-1", "@you", "\ttab", "\rreturn", "'quoted", "'=twice", "'+1", "new\nline", "com,ma", 'quo"te',
    "two  words ", "per%cent", "日本語", "مرحبا", "\u202ereversed", "e\u0301 decomposed", "é composed", "\U0001f600",
    "#hash", "semi;colon", "back\\slash", "no extension", "x" * 240, ".hidden", "-", "--out", "NULL", "1e5", "caf\\xe9",
]  # fmt: skip


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rows_of(path):
    """The rows of a csv file, dicts of strings."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """Tests write to no real home: tclip's cache of features and every download go to a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("home"))
        for name in ("HOME", "USERPROFILE"):
            patch.setenv(name, folder)
        yield folder


@pytest.fixture
def offline(monkeypatch):
    """No network: every proxy is a closed port."""
    for name in ("http", "https", "all", "no"):
        for variable in (f"{name}_proxy", f"{name}_proxy".upper()):
            monkeypatch.setenv(variable, "" if name == "no" else "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def reference():
    """reference("eurosat.zip") is the path of a file of the public reference data; without it the test is skipped."""
    folder = Path(os.environ.get("TCLIP_DATA") or ROOT.parent / "shared" / "data")

    def find(name):
        if not (folder / name).is_file():
            pytest.skip(f"no reference data: {name} is not in {folder} (the variable TCLIP_DATA names the folder)")
        return folder / name

    return find


class Child:
    """A process of the command, the first of a group of its own; both its streams go to a file."""

    def __init__(self, fork, code, cwd, log):
        self.log, self.process = log, fork.Process(target=Child.work, args=(code, str(cwd), str(log)))
        self.process.start()

    @staticmethod
    def work(code, cwd, log):
        os.setsid()
        os.chdir(cwd)
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        try:
            exec(code, {"__name__": "__main__"})
        finally:
            atexit._run_exitfuncs()  # which multiprocessing leaves out

    @property
    def output(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def code(self):
        """Its exit code, minus the number of the signal that killed it, or None."""
        return self.process.exitcode

    def send(self, number):
        """A signal to it and to its workers, as a terminal sends Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait_until(self, true, seconds=120):
        """Wait until something holds, or the process has ended."""
        deadline = time.monotonic() + seconds
        while not true() and self.code is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                pytest.fail(f"it hangs: {self.output}")
            time.sleep(0.002)

    def wait(self):
        self.wait_until(lambda: False)
        return self.code


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """nursery.tclip("train", "photos", cwd=folder) starts the command, after the code `before`: a fork
    of a process that has imported tclip already, which else takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("there is no fork")
    fork, logs = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("logs")
    fork.set_forkserver_preload(["conftest", "open_clip", "tclip_app.cli"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()

    def tclip(*arguments, cwd, before=""):
        argv = [str(argument) for argument in arguments]
        code = f"import tclip, tclip_app.cli\n{before}\ntclip_app.cli.main({argv!r})"
        return Child(fork, code, cwd, logs / f"{time.monotonic_ns()}.log")

    return types.SimpleNamespace(tclip=tclip)
