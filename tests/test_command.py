"""The command line: what a run leaves behind, how it goes on, and how mistakes are answered."""

import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from conftest import rows_of
from PIL import Image
from sklearn.datasets import load_digits

import tclip
from tclip import Config, UserError, main

SMALL = ["--epochs", "2", "--size", "8", "--device", "cpu", "--label-momentum", "0.8"]
FILES = {"config.json", "checkpoint.pt", "metrics.csv", "labels.csv", "model.pt", "summary.json", "noise.png"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of the results of one small run on the digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        main(SMALL)
        return Path("runs/digits").resolve()


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

    model = torch.load(finished / "model.pt", weights_only=True)
    student = tclip.Student(model["arch"], len(model["classes"]), model["size"])
    student.load_state_dict(model["student"])
    pixels = torch.from_numpy((digits.images * 255 / 16).round()).byte()[:, None].expand(-1, 3, -1, -1)
    said = tclip.predict(student, pixels).argmax(1)
    assert [row["student_label"] for row in rows] == [model["classes"][c] for c in said[unlabeled]]
    right = (said == torch.from_numpy(digits.target))[heldout].float().mean().item()
    assert summary["heldout_student_accuracy"] == pytest.approx(right)
    assert 0.7 < summary["heldout_teacher_accuracy"] < 0.9


def test_resume(finished, tmp_path, monkeypatch, capsys):
    """--resume completes a run where its folder lies now, with the same results, and tells them; what is given anew
    replaces the run's settings, so that it can be made longer. Anything else that is no run is told."""
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(finished, "moved"))
    for name in FILES - {"config.json", "checkpoint.pt", "metrics.csv"}:
        (copy / name).unlink()
    main(["--resume", "moved"])
    assert {file.name for file in copy.iterdir()} == FILES and not Path("runs").exists()
    assert (copy / "labels.csv").read_text() == (finished / "labels.csv").read_text()
    said, summary = capsys.readouterr().out, json.loads((copy / "summary.json").read_text())
    for images in ("unlabeled", "heldout"):
        for who in ("teacher", "student"):
            assert f"{summary[f'{images}_{who}_accuracy']:.1%}" in said
    assert "s on cpu; see moved" in said
    main(["--resume", "moved/checkpoint.pt", "--epochs", "3", "--cache", "none"])  # a file in it means the run
    assert [row["epoch"] for row in rows_of(copy / "metrics.csv")] == ["1", "2", "3"]
    assert (copy / "config.json").read_text() == (finished / "config.json").read_text()  # as the run began
    with pytest.raises(UserError, match="^--resume nowhere: there is no run$"):
        main(["--resume", "nowhere"])


def test_folders_and_interruption(tmp_path, monkeypatch):
    """Of runs that begin together each gets a folder of its own; nothing is written over. Ctrl-C tells how to go on."""
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda seed: tclip.claim_folder(Config(seed=seed)), range(8)))
    assert sorted(outs) == ["runs/digits", *(f"runs/digits-{i}" for i in range(2, 9))]
    with pytest.raises(UserError, match="runs/digits exists"):
        tclip.claim_folder(Config(out="runs/digits"))
    with pytest.raises(UserError, match="^stopped; go on with --resume run$"):
        tclip.run(Config(out="run"), lambda config: (_ for _ in ()).throw(KeyboardInterrupt))


def test_class_prior(tmp_path, monkeypatch):
    """Shares in the order of the classes, or with their names, of any sum, here or in a file; wrong ones are told
    before CLIP is asked. The run goes on with the numbers alone."""
    monkeypatch.chdir(tmp_path)
    Path("shares").write_text("cow: 2\r\ncat :5\n\na dog:3\n", "utf-8-sig", newline="")
    assert tclip.class_shares("none", ["cat", "a dog", "cow"]) is None
    assert tclip.class_shares("uniform", range(3)).tolist() == [1, 1, 1]
    assert tclip.class_shares("uniform:1,dress:2", ["dress", "uniform"]).tolist() == [2, 1]
    Path("picture").write_bytes(b"\x89PNG")
    for prior in ("5, 3,2", "a dog:3,cow: 2,cat:5", "shares"):
        assert tclip.class_shares(prior, ["cat", "a dog", "cow"]).tolist() == [5, 3, 2]
    digits = tclip.DATASETS["digits"]["classes"]
    named = [",".join(f"{name}:{i + 1}" for i, name in enumerate(names)) for names in (digits[1:], digits[1:] * 2)]
    monkeypatch.setattr(tclip, "Clip", None)
    ones, extra = "1,1,1,1,1,1,1,1,1,", (",10", ",ten:10", ",one:10", ",zero:", ",zero:1,zero:1")
    wrong = "1,2", "even", "", "picture", ones + "0", ones + "1e-9", ones + "nan", *named
    for prior in (*wrong, *(named[0] + more for more in extra)):
        with pytest.raises(UserError, match=f"^--class-prior {prior}: none, uniform, or 10 shares[^\n]*$"):
            main(["--class-prior", prior])
    monkeypatch.setattr(tclip, "run", lambda config, resumed: told.append(config.class_prior))
    told = []
    main(["--class-prior", named[0] + ",zero:0.7"])
    assert told == ["0.7,1,2,3,4,5,6,7,8,9"]
    Path("config.json").write_text(json.dumps(dict(dataset="two")))
    monkeypatch.setitem(tclip.DATASETS, "two", dict(classes=["cat", "dog"], settings={}))
    main(["--resume", ".", "--class-prior", "dog:1,cat:2"])  # of the run's own classes
    assert told[1:] == ["2,1"]


def test_home_and_streams(tmp_path, monkeypatch):
    """~ is the home after a =, too; closed streams, and one that lacks characters, do not end a run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    main([*SMALL, "--out=~/日本"])
    assert (tmp_path / "日本/summary.json").exists()


def test_no_place_for_features(tmp_path, monkeypatch):
    """A home that is not known, a file where the folder of CLIP's features would be, and a folder that takes no file
    are told in one line, before CLIP is asked."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(tclip.Clip, "encode_images", None)
    for cache in ("~nobody-is-called-so/cache", "file/cache", *["/proc"] * Path("/proc").is_dir()):
        with pytest.raises(UserError, match=f"^--cache {cache}: [^\n]+; choose another, or none$"):
            main([*SMALL, "--cache", cache])


MISTAKES = """--dataset cifar11: choose from digits, cifar10
--arch resnet19: .*resnet18
--epochs 0: from 1 to
--batch-size 1: from 2 to
--size 5000: from 8 to 1024
--lr nan: from 0(.0)? to
--label-momentum 1.1: from 0 to 1
--seed -1: from 0
--views sketch: choose from photo, overhead
--device tpu: choose from .*cpu"""


@pytest.mark.parametrize("line", MISTAKES.splitlines())
def test_mistakes(line, tmp_path, monkeypatch):
    """Wrong names and values out of range are told in one line, before anything is read or written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{line}[^\n]*$"):
        main(line.split(":")[0].split())
    assert not list(tmp_path.iterdir())


def test_no_compiler():
    """--compile without one: a line, before anything is made or read."""
    gone, anew = torch._inductor.config.patch("cpp.cxx", (None, "/none")), torch.compiler.config.patch
    with (
        gone,
        anew(force_disable_caches=True),
        pytest.raises(UserError, match="^--compile: [^\n]*compiler[^\n]*/none[^\n]*$"),
    ):
        main(["--compile", "--out", "none"])
    assert not os.path.exists("none")
