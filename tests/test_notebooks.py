"""Tutorials: each script and its notebook are one, the notebooks were run as they lie there, and the scripts run."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TUTORIALS = ROOT / "tutorials"
SCRIPTS = sorted(TUTORIALS.glob("0*.py"))
NAMES = [script.stem for script in SCRIPTS]
LOCAL = re.compile(r"(?<![\w.:/])/(?:tmp|home|root|work|Users|mnt|content|private|var|opt|usr)/\S*|\b[A-Z]:\\\S+")
SECRET = re.compile(
    r"gh[pousr]_\w{20,}|github_pat_\w+|\bsk-[\w-]{16,}|\bhf_\w{16,}|AKIA[A-Z0-9]{16}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?i:password|passwd|api_?key|secret|bearer)\s*[=:]\s*\S+"
)

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="there are no tutorials beside this checkout")


def notebook(name):
    return json.loads((TUTORIALS / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_cells(name):
    return [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


def text_of(output):
    """All text in an output; of pictures only that they are there."""
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


@pytest.mark.parametrize("name", NAMES)
def test_pair(name):
    """The script and the notebook hold the same cells. (If not: see tutorials/README.md, "To change one".)"""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
    compare = pytest.importorskip("jupytext.compare")
    script, saved = (jupytext.read(TUTORIALS / f"{name}.{kind}") for kind in ("py", "ipynb"))
    compare.compare_notebooks(script, saved, fmt="py:percent", compare_ids=False)


@pytest.mark.parametrize("name", NAMES)
def test_was_run(name):
    """Every code cell of the committed notebook was run, in order from the top, in full length and without an error."""
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [text_of(output) for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (TUTORIALS / f"{name}.ipynb").stat().st_size < 700_000


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_clean(name):
    """No output tells a path of the machine it was made on, nor a secret."""
    for cell in code_cells(name):
        for output in cell["outputs"]:
            found = LOCAL.search(text_of(output)) or SECRET.search(text_of(output))
            assert not found, found


def test_patterns():
    """What the test above looks for is found, and nothing else."""
    assert LOCAL.search("File /home/me/x.py") and LOCAL.search("in '/tmp/y'") and LOCAL.search(r"C:\Users\me")
    assert not LOCAL.search("https://site.org/home/x") and not LOCAL.search("runs/tmp/x and 1/2")
    assert SECRET.search("hf_" + "a" * 20) and SECRET.search("api_key = abc") and not SECRET.search("a secret of CLIP")


@pytest.mark.parametrize("name", NAMES)
def test_links(name):
    """Links to files lead somewhere, the badge leads to this very notebook, and functions that are linked exist."""
    import tclip

    text = "\n".join("".join(cell["source"]) for cell in notebook(name)["cells"] if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (TUTORIALS / target).is_file(), target
    assert f"/blob/main/tutorials/{name}.ipynb" in text
    for path in re.findall(r"\[`([\w.]+)`\]\(\.\./tclip\.py\)", text):
        thing = tclip
        for part in path.split("."):
            thing = getattr(thing, part)


@pytest.mark.parametrize("name", NAMES)
def test_script_runs(name, tmp_path):
    """As plain Python and without a display, in its quick setting: a few epochs on a part of the images."""
    quick = dict(
        TCLIP_QUICK="1", MPLBACKEND="Agg", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLCONFIGDIR=str(tmp_path)
    )
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("IPython", reason="IPython is not installed")
    done = subprocess.run(
        [sys.executable, f"{name}.py"],
        cwd=TUTORIALS,
        env=os.environ | quick,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_picture_in_the_readme(name):
    """The picture of a notebook that the README shows is one that the notebook drew, as it is now."""
    shown = base64.b64encode((TUTORIALS / "pictures" / f"{name[:2]}.png").read_bytes()).decode()
    outputs = [output.get("data", {}) for cell in code_cells(name) for output in cell["outputs"]]
    assert shown in [data["image/png"].replace("\n", "") for data in outputs if "image/png" in data]
    assert f"tutorials/pictures/{name[:2]}.png" in (ROOT / "README.md").read_text(encoding="utf-8")
