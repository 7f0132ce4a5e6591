"""The benchmark for a GPU: the data that it packs is all it needs, and every part runs, at toy size on a CPU."""

import os
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import ROOT, rows_of
from test_suites import root as root  # a fixture: tiny files laid out as the real ones

sys.path.insert(0, str(ROOT / "tutorials/benchmark"))
gpu = pytest.importorskip("gpu")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_dry_run(root, tmp_path):
    """Packed data is enough for every part; each writes its rows; called again, only what is missing is done."""
    gpu.pack(root, tmp_path / "packed", heldout=5)
    with zipfile.ZipFile(tmp_path / "packed" / "eurosat.zip") as archive:
        assert len(archive.namelist()) == 40 + 5
    parts = gpu.PARTS.keys() - {"clip", "cross-entropy", "SupCon", "speed-64", "seeds"}  # there are others like them
    options = ["--dry", "--root", tmp_path / "packed", "--results", tmp_path / "out", "--only"]
    command = [str(word) for word in (sys.executable, ROOT / "tutorials/benchmark/gpu.py", *options)]
    first = subprocess.run([*command, *parts], capture_output=True, text=True)
    assert first.stdout.count(": done, ") == len(parts), first.stdout + first.stderr
    sections = {row["section"].split(",")[0] for row in rows_of(tmp_path / "out/gpu.csv")}
    assert sections == {"train", "labels", "profile", "precision"}
    files = {"cifar10-votes-60-1-epochs": 2, "cifar10-votes-truth-60-1-epochs": 1, "eurosat-gpt4v-60-1-epochs": 2}
    assert {name: len(rows_of(tmp_path / f"out/{name}.csv")) for name in files} == files
    again = subprocess.run([*command, "labels", "tclip"], capture_output=True, text=True).stdout
    assert again.count(": done, ") == 2 and "seed 0:" not in again and "end_epoch" not in again


def test_limit(tmp_path, monkeypatch, capsys):
    """A part that hangs or fails does not keep the others from running."""
    works = lambda given: (given.results / "worked").touch()  # noqa: E731
    parts = dict(hangs=(0.5, lambda given: time.sleep(60)), fails=(9, lambda given: 1 / 0), works=(9, works))
    monkeypatch.setattr(gpu, "PARTS", parts)
    gpu.main(["--only", *parts, "--results", str(tmp_path)])
    said = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["hangs: stopped at its limit", "fails: failed", "works: done"] and (tmp_path / "worked").exists()
