"""Tutorials: each script and its notebook are one, the notebooks were run as they lie there, and the scripts run."""

import base64
import json
import os
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import tclip

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"
NAMES = [script.stem for script in sorted(TUTORIALS.glob("0*.py"))]
PRIVATE = re.compile(  # a path of the machine that it was made on, or a key
    r"(?<![\w.:/])/(?:tmp|home|root|work|Users|mnt|content|private|var|opt|usr)/\S*|\b[A-Z]:\\\S+"
    r"|gh[pousr]_\w{20,}|\bhf_\w{16,}|(?i:password|api_?key|secret)\s*[=:]\s*\S+"
)


def cells(name, kind):
    """The cells of a notebook that are "code" or "markdown"."""
    notebook = json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def outputs(name):
    """Each output of a notebook: (its kind, its text, its picture in base64)."""
    for output in [output for cell in cells(name, "code") for output in cell["outputs"]]:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/markdown", data.get("text/plain", ""))))
        yield output.get("name", output["output_type"]), text, data.get("image/png", "").strip()


@pytest.mark.parametrize("name", NAMES)
def test_pair(name):
    """The script and the notebook hold the same cells. (If not: python tutorials/build.py)"""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    compare = pytest.importorskip("jupytext.compare")
    script, saved = (jupytext.read(TUTORIALS / f"{name}.{kind}") for kind in ("py", "ipynb"))
    compare.compare_notebooks(script, saved, fmt="py:percent", compare_ids=False)


@pytest.mark.parametrize("name", NAMES)
def test_was_run(name):
    """Every code cell was run, in order from the top, without an error or a warning; outputs tell nothing private."""
    counts = [cell["execution_count"] for cell in cells(name, "code")]
    assert counts == list(range(1, len(counts) + 1))
    for kind, text, _ in outputs(name):
        assert kind not in ("error", "stderr"), text
        assert not PRIVATE.search(text), text
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 700_000


def test_private():
    """What the test above looks for is found, and nothing else."""
    for text in ("File /home/me/x.py", "in '/tmp/y'", r"C:\Users\me", "hf_" + "a" * 20, "api_key = abc"):
        assert PRIVATE.search(text)
    for text in ("https://site.org/home/x", "runs/tmp/x and 1/2", "a secret of CLIP"):
        assert not PRIVATE.search(text)


@pytest.mark.parametrize("name", NAMES)
def test_links(name):
    """Links lead to files that exist, names that are linked are tclip's, and no account stands for one to come."""
    text = "\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (TUTORIALS / target).is_file(), target
    assert "OWNER" not in (TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8")
    for path in re.findall(r"\[`([\w.]+)`\]\(\.\./tclip\.py\)", text):
        attrgetter(path)(tclip)


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    """At most 25 cells; each section is a question with a short answer under it; two exercises, answers hidden."""
    text = "\n".join("".join(cell["source"]) for cell in cells(name, "markdown"))
    _, *sections, exercises = re.split(r"^## ", text, flags=re.MULTILINE)
    assert len(cells(name, "code") + cells(name, "markdown")) <= 25
    for section in sections:
        assert re.match(r".+\?\n\n\*\*In short:\*\* [^\n]{10,120}[.]\n", section + "\n"), section
    parts = re.findall(r"Exercises$|^\*\*\d\.\*\*|^<details><summary>", exercises, re.MULTILINE)
    assert parts == ["Exercises", "**1.**", "<details><summary>", "**2.**", "<details><summary>"]


@pytest.mark.parametrize("name", NAMES)
def test_code_that_is_shown(name):
    """Code under a link to lines of tclip.py is what stands there today. (If not: python tutorials/build.py --keep)"""
    source, shown = (ROOT / "tclip.py").read_text(encoding="utf-8").splitlines(), list(outputs(name))
    for (_, link, _), (_, code, _) in zip(shown, shown[1:]):
        if lines := re.search(r"\(\.\./tclip\.py#L(\d+)-L(\d+)\)", link):
            there = source[int(lines[1]) - 1 : int(lines[2])]
            assert [line.strip() for line in code.rstrip().splitlines()] == [line.strip() for line in there], link


@pytest.mark.parametrize("name", NAMES)
def test_picture(name):
    """The picture of a notebook that other pages show is one that the notebook drew, as it is now."""
    picture = base64.b64encode((TUTORIALS / "pictures" / f"{name[:2]}.png").read_bytes()).decode()
    assert picture in [drawn.replace("\n", "") for _, _, drawn in outputs(name)]


@pytest.mark.parametrize("name", NAMES)
def test_script_runs(name, tmp_path):
    """As plain Python and without a display, in its quick setting: few epochs on a part of the images."""
    pytest.importorskip("IPython", reason="IPython is not installed")
    quick = dict(TCLIP_QUICK="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1", MPLCONFIGDIR=str(tmp_path))
    command = [sys.executable, f"{name}.py"]
    done = subprocess.run(command, cwd=TUTORIALS, env=os.environ | quick, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
