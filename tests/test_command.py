"""The command line: what a run leaves behind, how it goes on, and how mistakes are answered."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from conftest import rows_of
from PIL import Image
from sklearn.datasets import load_digits

import tclip
from tclip import Config, UserError, load_student, main

SMALL = ["--epochs", "2", "--size", "8", "--device", "cpu", "--label-momentum", "0.8"]
FILES = {"config.json", "checkpoint.pt", "metrics.csv", "labels.csv", "model.pt", "summary.json", "noise.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the results of one small run on the digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        main(SMALL)
        return Path("runs/digits").resolve()


@pytest.fixture
def copy(finished, tmp_path, monkeypatch):
    """A copy of that run, to be spoilt, in another folder, which is now the current one."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(finished, "moved"))


def test_results(finished):
    """Every file is there, nothing half-written; config.json holds every setting; labels.csv, model.pt and summary.json
    say the same, counted image by image with scikit-learn's truth; the picture is one."""
    assert {file.name for file in finished.iterdir()} == FILES
    config = asdict(Config(**json.loads((finished / "config.json").read_text())))
    assert dict(size=8, arch="resnet8", clip="offline", out="runs/digits", lr=0.1).items() <= config.items()
    with Image.open(finished / "noise.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300

    summary, rows = json.loads((finished / "summary.json").read_text()), rows_of(finished / "labels.csv")
    names, digits = tclip.DATASETS["digits"]["classes"], load_digits()
    unlabeled = [int(row["file"]) for row in rows]
    heldout = sorted(set(range(1797)) - set(unlabeled))
    assert len(set(unlabeled)) == summary["images"] == 1437 and summary["device"] == "cpu" and summary["seconds"] > 0
    assert [row["truth"] for row in rows] == [names[digits.target[i]] for i in unlabeled]
    for who, column in dict(teacher="teacher_label", student="student_label", label="label").items():
        right = [row["truth"] for row in rows if row[column] == row["truth"]]
        assert summary[f"unlabeled_{who}_accuracy"] == pytest.approx(len(right) / 1437)
        share = right.count("three") / [row["truth"] for row in rows].count("three")
        assert summary[f"unlabeled_{who}_per_class"]["three"] == pytest.approx(share)
    assert summary["agreement"] == pytest.approx(sum(r["teacher_label"] == r["student_label"] for r in rows) / 1437)
    assert all(0.1 <= float(row[key]) <= 1.001 for row in rows for key in row if key.endswith("confidence"))

    student, classes = load_student(finished / "model.pt")
    pixels = torch.from_numpy((digits.images * 255 / 16).round()).byte()[:, None].expand(-1, 3, -1, -1)
    probs = tclip.predict(student, pixels)
    assert [row["student_label"] for row in rows] == [classes[c] for c in probs[unlabeled].argmax(1)]
    right = (probs.argmax(1) == torch.from_numpy(digits.target))[heldout].float().mean().item()
    assert (
        summary["heldout_student_accuracy"] == pytest.approx(right) and 0.7 < summary["heldout_teacher_accuracy"] < 0.9
    )


def test_resume(copy, finished, capsys):
    """--resume completes a run where its folder lies now, with the same results, and tells them."""
    for name in FILES - {"config.json", "checkpoint.pt", "metrics.csv"}:
        (copy / name).unlink()
    main(["--resume", "moved", "--cache", "none"])
    assert {file.name for file in copy.iterdir()} == FILES and not Path("runs").exists()
    assert (copy / "labels.csv").read_text() == (finished / "labels.csv").read_text()
    lines, summary = capsys.readouterr().out.splitlines(), json.loads((copy / "summary.json").read_text())
    for line, images in zip(lines, ("unlabeled", "heldout")):
        teacher, student = (summary[f"{images}_{who}_accuracy"] for who in ("teacher", "student"))
        assert line == f"{images} images right: teacher {teacher:.1%}, student {student:.1%}"
    assert lines[-1].endswith("s on cpu; results in moved")


def test_resume_rules(copy):
    """Where things lie may be given anew; what is learned, and how, not. A folder without a run's settings is told."""
    given = dict(root="elsewhere", cache="none", device="auto")
    saved = json.loads((copy / "config.json").read_text())
    assert asdict(tclip.resume(Config, "moved", given)) == saved | given | dict(out="moved")
    for name in {f.name for f in fields(Config)} - given.keys():
        with pytest.raises(UserError, match=f"--resume takes --{name.replace('_', '-')} from moved/config.json"):
            tclip.resume(Config, "moved", {name: saved[name]})
    (copy / "config.json").write_text(json.dumps(saved | dict(momentum=1)))
    for folder in ("moved", "nowhere"):
        with pytest.raises(UserError, match=f"--resume {folder}: there is no config.json"):
            main(["--resume", folder])


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C ends with one line, which says how to go on."""
    monkeypatch.setattr(tclip, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(UserError, match=f"^tclip: stopped; go on with --resume {tmp_path}/run$"):
        main([*SMALL, "--out", f"{tmp_path}/run"])


def test_folders_of_results(tmp_path, monkeypatch):
    """Of runs that begin together each gets a folder of its own; nothing is written over."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda seed: tclip.claim_folder(Config(seed=seed)), range(8)))
    assert sorted(outs) == ["runs/digits", *(f"runs/digits-{i}" for i in range(2, 9))]
    for seed, out in enumerate(outs):
        assert dict(seed=seed, out=out).items() <= json.loads(Path(out, "config.json").read_text()).items()
    with pytest.raises(UserError, match="runs/digits exists"):
        tclip.claim_folder(Config(out="runs/digits"))


def test_help(capsys, monkeypatch):
    """--help names every flag, its default and its words, in lines that fit."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--resume RUN" in text and max(map(len, text.splitlines())) <= 120
    flags = dict(re.findall(r"^  --(\S+) (.*\n(?:    .*\n)*)", text, re.M))
    for f in fields(Config):
        said = " ".join(flags[f.name.replace("_", "-")].split())
        assert f.metadata["help"] in said and (f.name in ("compile", "out") or f"[{f.default}]" in said)
        assert f.type is not str or all(word in said for word in f.metadata["allowed"] or ())


MISTAKES = """--dataset cifar11: choose from digits, mnist, cifar10, eurosat
--arch resnet19: .*resnet18
--epochs 0: must be from 1 to
--batch-size 1: must be from 2 to
--size 5000: must be from 8 to 1024
--lr nan: must be from 0 to
--label-momentum 1.1: must be from 0 to 1
--seed -1: must be from 0
--views sketch: choose from photo, overhead
--device tpu: choose from auto, cpu, cuda"""


@pytest.mark.parametrize("line", MISTAKES.splitlines())
def test_mistakes(line, tmp_path, monkeypatch):
    """Wrong names and values out of range are told in one line, before anything is read or written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^tclip: {line}[^\n]*$"):
        main(line.split(":")[0].split())
    assert not list(tmp_path.iterdir())


def test_full_disk(tmp_path):
    """One line, and the file of before stays. (A limit on the size of files stands for the disk.)"""
    resource, path = pytest.importorskip("resource"), tmp_path / "file"
    path.write_text("of before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    zeros = torch.zeros(100_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        for write in (lambda file: torch.save(zeros, file), lambda file: file.write(zeros.numpy())):
            with pytest.raises(UserError, match=f"^tclip: cannot write {path}: .*too large"):
                tclip.write_whole(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "of before"
    with pytest.raises(RuntimeError, match="shape"):  # what is no fault of the disk keeps its traceback
        tclip.write_whole(path, lambda file: torch.zeros(2).view(3))


def test_csv(tmp_path):
    """Commas, quotes, lines and umlauts come back; what a spreadsheet would run as a formula is text for it."""
    rows = [dict(a='x, "y"\nz', b="ü", c=1.5), dict(a="=1+1", b="-2", c=-2), dict(a="'=1", b="a=b", c=0)]
    tclip.write_csv(tmp_path / "rows.csv", rows)
    texts = [tuple(row.values()) for row in rows_of(tmp_path / "rows.csv")]
    assert texts == [('x, "y"\nz', "ü", "1.5"), ("'=1+1", "'-2", "-2"), ("''=1", "a=b", "0")]
