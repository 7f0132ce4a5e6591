"""What the tests share: tclip of this checkout, a working `import clip`, tiny images, and the reference data."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
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


NURSERY = """
import json, os, signal, sys, traceback
import tclip
try:  # what else a run loads
    import matplotlib.figure, sklearn.datasets, tclip_report
except ImportError:
    pass
for line in sys.stdin:
    job = json.loads(line)
    if "poll" in job:
        pid, status = os.waitpid(job["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    code = 1
    try:
        os.setsid()
        os.chdir(job["cwd"])
        for stream, file in enumerate((os.devnull, job["log"], job["log"])):
            os.dup2(os.open(file, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        exec(job["code"], {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class Child:
    """A process of the nursery, the first of a group of its own."""

    def __init__(self, ask, pid, log):
        self.ask, self.pid, self.log, self.code = ask, pid, log, None

    @property
    def output(self):
        """What it has printed so far, on both streams."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def ended(self):
        if self.code is None:
            self.code = self.ask(poll=self.pid)
        return self.code is not None

    def send(self, number):
        """A signal to it and to its workers, as a terminal sends Ctrl-C."""
        os.killpg(self.pid, number)

    def wait_until(self, true, seconds=120):
        """Wait until something holds, or the process has ended."""
        deadline = time.monotonic() + seconds
        while not true() and not self.ended:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                pytest.fail(f"it hangs: {self.output}")
            time.sleep(0.002)

    def wait(self):
        """Its exit code: minus the number of the signal that killed it."""
        self.wait_until(lambda: False)
        return self.code


class Nursery:
    """Processes that have imported tclip already, each a fork of one that waits: a fresh one would need seconds."""

    def __init__(self, logs):
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-c", NURSERY]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=logs)
        self.process = subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=path), **pipes)
        self.logs, self.started = logs, 0

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code, cwd):
        """A process that executes this code in that folder."""
        self.started += 1
        log = self.logs / f"{self.started}.log"
        return Child(self.ask, self.ask(code=code, cwd=str(cwd), log=str(log)), log)

    def tclip(self, *arguments, cwd, before=""):
        """A process of the command line, which executes the code `before` first."""
        argv = [str(argument) for argument in arguments]
        return self.start(f"import sys, tclip\n{before}\nsys.exit(tclip.main({argv!r}))", cwd)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()
