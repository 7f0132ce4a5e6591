"""The command line as a user calls it: what a run leaves behind, how it goes on, and how every mistake is answered."""

import csv
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import tclip
from tclip import OPENAI_CLIP, Config, complete, load_images, load_student, main

SCRIPT = Path(tclip.__file__).resolve()
SMALL = ("--epochs", "2", "--size", "8", "--device", "cpu", "--label-momentum", "0.9")
FILES = {"config.json", "checkpoint.pt", "metrics.csv", "labels.csv", "model.pt", "summary.json"}
if importlib.util.find_spec("tclip_report"):  # beside tclip.py, or installed
    FILES |= {"report.html", "noise.png"}
OPEN = {"images", "classes", "templates", "truth", "pseudo_labels"}  # settings that may stay None


def call(*arguments, cwd):
    """The command in a process of its own, in another folder than the script's."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", errors="replace")


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One small run on the digits: (the finished process, the folder of its results)."""
    cwd = tmp_path_factory.mktemp("cwd")
    done = call(*SMALL, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done, cwd / "runs" / "digits"


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that run, somewhere else, to be spoilt."""
    return Path(shutil.copytree(finished[1], tmp_path / "moved"))


def test_other_teacher_of_a_data_set(finished, tmp_path):
    """Pseudo-labels whose classes are in another order: those of a csv file are sorted, the digits' go from zero up.

    Perfect ones have an accuracy of 1, and the labels.csv of a run is a teacher as good as it was.
    """
    source, classes = tclip.open_dataset("digits")
    rows = [dict(file=f"{i:05d}", label=classes[label]) for i, (_, label) in zip(source.indices, source)]
    tclip.write_csv(tmp_path / "perfect.csv", rows)
    shutil.copy(finished[1] / "labels.csv", tmp_path)
    right = json.loads((finished[1] / "summary.json").read_text())["label_accuracy"]
    for file, accuracy in (("perfect.csv", 1.0), ("labels.csv", right)):
        out = tmp_path / file.removesuffix(".csv")
        assert main([*SMALL, "--pseudo-labels", str(tmp_path / file), "--out", str(out)]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["teacher_accuracy"] == accuracy and list(summary["per_class_teacher"]) == classes


@pytest.fixture(scope="module")
def summary(finished):
    return json.loads((finished[1] / "summary.json").read_text())


def test_files(finished):
    """Everything is there, nothing half-written is left, and the picture is one."""
    _, run = finished
    assert {file.name for file in run.iterdir()} == FILES
    if "noise.png" in FILES:
        with Image.open(run / "noise.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 300


def test_last_line(finished, summary):
    """The last line tells both accuracies, on unlabeled and on held-out images, of teacher and student."""
    last = finished[0].stdout.splitlines()[-1]
    keys = ["teacher_accuracy", "transductive_accuracy", "teacher_inductive_accuracy", "inductive_accuracy"]
    places = [last.index(f"{100 * summary[key]:.1f} %") for key in keys]
    assert places[0] <= places[1] and places[2] <= places[3] and "Traceback" not in finished[0].stderr


def test_config(finished):
    """config.json holds every setting, open are those alone that say "none", and it makes the same Config again."""
    values = json.loads((finished[1] / "config.json").read_text())
    assert set(values) == {f.name for f in dataclasses.fields(Config)}
    assert {name for name, value in values.items() if value is None} == OPEN
    assert values["epochs"] == 2 and values["size"] == 8 and values["dataset"] == "digits"
    assert dataclasses.asdict(Config(**values)) == values


def test_metrics(finished, summary):
    """A row an epoch, finite."""
    rows = rows_of(finished[1] / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"loss", "cross_entropy", "c3l", "lr", "labels_changed", "seconds"} <= set(rows[0])
    assert all(abs(float(value)) < 1e6 for row in rows for value in row.values())


def test_labels(finished, summary):
    """labels.csv has each unlabeled image once, and its labels are as right as the summary says."""
    rows, truth = rows_of(finished[1] / "labels.csv"), load_digits().target
    assert list(rows[0]) == ["file", "teacher_label", "teacher_confidence", "label", "confidence", "changed"]
    assert len({row["file"] for row in rows}) == len(rows) == summary["images"] == 1437
    names = tclip.DATASETS["digits"].classes
    for column, key in (("teacher_label", "teacher_accuracy"), ("label", "label_accuracy")):
        right = sum(row[column] == names[truth[int(row["file"])]] for row in rows)
        assert right / len(rows) == pytest.approx(summary[key])
    for row in rows:
        assert row["changed"] == str(int(row["label"] != row["teacher_label"]))
        assert 0.1 <= float(row["confidence"]) <= 1 and 0.1 <= float(row["teacher_confidence"]) <= 1


def test_model(finished, summary):
    """model.pt holds tensors and plain types only, and its student is as right as the summary says."""
    file = finished[1] / "model.pt"
    assert set(torch.load(file, weights_only=True)) == {"arch", "size", "classes", "student"}
    student, classes = load_student(file)
    assert classes == list(tclip.DATASETS["digits"].classes) and not student.training
    for split, key in (("train", "transductive_accuracy"), ("test", "inductive_accuracy")):
        images = load_images("digits", split=split, size=8)
        right, said = 0, tclip.predict(student, images.pixels).argmax(1)
        for answer, truth in zip(said.tolist(), images.truth.tolist()):
            right += answer == truth
        assert right / len(said) == pytest.approx(summary[key])


def test_summary(summary):
    """The summary says with what the numbers were got, and its classes average to its accuracies."""
    assert summary["dataset"] == "digits" and summary["teacher"] == "offline" and summary["seed"] == 0
    assert summary["skipped"] == 0 and 0 < summary["agreement"] <= 1
    assert summary["torch"] == torch.__version__ and summary["device"] == "cpu" and summary["seconds"] > 0
    sizes = load_images("digits", size=8).truth.bincount().tolist()
    for who, key in (("teacher", "teacher_accuracy"), ("student", "transductive_accuracy")):
        per_class = summary[f"per_class_{who}"]
        assert list(per_class) == list(tclip.DATASETS["digits"].classes)
        mean = sum(share * size for share, size in zip(per_class.values(), sizes)) / sum(sizes)
        assert mean == pytest.approx(summary[key])


def test_repeats_to_the_bit(finished, tmp_path, monkeypatch):
    """The same command gives the same student and the same labels, also by an --out of its own."""
    assert main([*SMALL, "--out", str(tmp_path / "again")]) == 0
    first, second = (torch.load(run / "model.pt", weights_only=True) for run in (finished[1], tmp_path / "again"))
    assert all(torch.equal(first["student"][name], second["student"][name]) for name in first["student"])
    assert (finished[1] / "labels.csv").read_bytes() == (tmp_path / "again" / "labels.csv").read_bytes()


def test_resume(copy, summary, tmp_path, monkeypatch, capsys):
    """--resume takes up a run where its folder lies now, whatever folder one is in, and completes it there."""
    for name in FILES - {"config.json", "checkpoint.pt", "metrics.csv"}:
        (copy / name).unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["--resume", str(copy)]) == 0
    assert {file.name for file in copy.iterdir()} == FILES and not list(elsewhere.iterdir())
    again = json.loads((copy / "summary.json").read_text())
    assert all(again[key] == summary[key] for key in summary if key != "seconds")
    assert str(copy) in capsys.readouterr().out


def test_default_out(tmp_path, monkeypatch):
    """Results go to runs/DATASET, then to the next free runs/DATASET-2, -3, ..., and never over others."""
    monkeypatch.chdir(tmp_path)
    for expected in ("digits", "digits-2", "digits-3"):
        out = complete(Config()).out
        assert Path(out) == Path("runs") / expected
        Path(out).mkdir(parents=True)
    assert Path(complete(Config(dataset="mnist")).out) == Path("runs/mnist")


def test_complete():
    """What is not set is as the data set's entry says; what is set stays."""
    config, recipe = complete(Config(dataset="stl10", size=48)), tclip.DATASETS["stl10"]
    assert (config.size, config.arch, config.views) == (48, recipe.arch, recipe.views)
    assert (config.clip, config.class_prior) == (recipe.clip, recipe.class_prior)


def test_help(capsys):
    """--help explains every setting."""
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "python tclip.py" in text and "--resume" in text
    for f in dataclasses.fields(Config):
        assert f"--{f.name.replace('_', '-')} " in text and " ".join(f.metadata["help"].split())[:30] in text


def test_ctrl_c(copy, monkeypatch, capsys):
    """Ctrl-C ends with 130 and the command that goes on, which is understood."""

    def stopped(config, resume):
        raise KeyboardInterrupt

    monkeypatch.setattr(tclip, "run", stopped)
    assert main(["--resume", str(copy)]) == 130
    error = capsys.readouterr().err
    assert f"--resume {copy}" in error and "Traceback" not in error


def test_no_half_written_file(tmp_path):
    """A file that cannot be written to its end leaves the one of before as it was."""
    tclip.write_csv(tmp_path / "rows.csv", [dict(a=1, b="x,y"), dict(a=2, b="ü")])
    assert rows_of(tmp_path / "rows.csv") == [dict(a="1", b="x,y"), dict(a="2", b="ü")]

    def rows():
        yield dict(a=3, b="new")
        raise ValueError("in the midst of it")

    with pytest.raises(tclip.UserError, match="midst"):
        tclip.write_csv(tmp_path / "rows.csv", rows())
    assert rows_of(tmp_path / "rows.csv") == [dict(a="1", b="x,y"), dict(a="2", b="ü")]


# Mistakes: each is answered by exit code 2 and one line that says what to do.


def line_of(error):
    """The one line of the answer."""
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("tclip: ")]
    assert len(lines) == 1, error
    return lines[0]


@pytest.fixture
def refused(capfd, tmp_path, monkeypatch):
    """refused(arguments) is the one line with which they are refused."""
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments):
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        return line_of(capfd.readouterr().err)

    return refuse


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--dataset", "cifar11"], ["cifar11", "cifar10"]),
        (["--dataset", "birds"], ["birds", "digits", "eurosat"]),
        (["--arch", "resnet19"], ["resnet19", "resnet18"]),
        (["--clip", "ViT-B/31"], ["ViT-B/31", "ViT-B/32"]),
        (["--clip", "ViT-B-32:laion3b"], ["ViT-B-32:laion3b", "ViT-B-32:laion2b"]),
        (["--clip", "ViT-B-31:laion2b_s34b_b79k"], ["ViT-B-31", "ViT-B-32:laion2b_s34b_b79k"]),
        (["--clip", "missing.pt"], ["missing.pt", "offline"]),
        (["--epochs", "0"], ["--epochs 0", "at least 1"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--epochs", "1.5"], ["--epochs", "1.5"]),
        (["--epochs"], ["--epochs"]),
        (["--size", "4"], ["--size 4", "8"]),
        (["--size", "5000"], ["--size 5000", "1024"]),
        (["--batch-size", "1"], ["--batch-size 1", "2"]),
        (["--lr", "-0.1"], ["--lr -0.1", "0"]),
        (["--lr", "nan"], ["--lr nan", "finite"]),
        (["--lr", "inf"], ["--lr inf", "finite"]),
        (["--temperature", "0"], ["--temperature 0", "0.001"]),
        (["--label-momentum", "1.1"], ["--label-momentum 1.1", "1.0"]),
        (["--seed", "-1"], ["--seed -1", "0"]),
        (["--seed", "99999999999999999999"], ["--seed 99999999999999999999"]),
        (["--seed", "9" * 400], ["--seed 999", "at most"]),
        (["--positives", "classes"], ["--positives classes", "both, class, instance"]),
        (["--negatives", "none"], ["--negatives none", "all, other, same"]),
        (["--views", "sketch"], ["--views sketch", "photo"]),
        (["--class-prior", "zipf"], ["--class-prior zipf", "uniform, none"]),
        (["--device", "tpu"], ["--device tpu", "cuda"]),
        (["--learning-rate", "1"], ["--learning-rate"]),
        (["digits"], ["digits"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--resume", "nowhere", "--epochs", "3"], ["nowhere"]),
        (["--epochs", "3", "--resume=nowhere"], ["nowhere"]),
    ],
    ids=lambda words: " ".join(words)[:60],
)
def test_mistakes(arguments, parts, refused, tmp_path):
    """Wrong names, values out of range, wrong kinds: told before anything is read or written."""
    message = refused(*arguments)
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir())


def test_mistakes_as_a_user_sees_them(tmp_path):
    """The same through a real process: exit code, one line on stderr, nothing on stdout."""
    done = call("--dataset", "cifar11", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "cifar10" in line_of(done.stderr)


def test_no_cuda(refused):
    """A device that is not there is told with those that are."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "cpu" in refused("--device", "cuda")


def test_out_is_not_empty(refused, tmp_path):
    """No results are written over others, nor into a file; an empty folder is welcome."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "full" in refused("--out", "full") and "notes.txt" in refused("--out", "full/notes.txt")
    assert "notes.txt" in refused("--out", "full/notes.txt/run", *SMALL)  # a folder that cannot be made
    (tmp_path / "empty").mkdir()
    assert complete(Config(out=str(tmp_path / "empty"))).out == str(tmp_path / "empty")


@pytest.mark.parametrize("size", [0, 100, 500_000])
def test_cut_off_clip(size, refused, tmp_path):
    """A checkpoint of CLIP that is cut off is named."""
    (tmp_path / "cut.pt").write_bytes(tclip.OFFLINE_CLIP.read_bytes()[:size])
    assert "cut.pt" in refused("--clip", "cut.pt")


def test_clip_with_code_in_it(refused, tmp_path):
    """A file that would run code when it is unpickled is refused, and none of its code is run."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"visual.proj": Bomb()}, tmp_path / "bomb.pt")
    assert "bomb.pt" in refused("--clip", "bomb.pt") and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["checkpoint.pt", "config.json"])
def test_cut_off_run(name, copy, refused):
    """--resume of a run whose checkpoint or settings are cut off names the file's folder."""
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    assert str(copy) in refused("--resume", copy)


def test_resume_with_other_settings(copy, refused):
    """A run goes on with its own settings; settings that tclip does not know are told."""
    assert "config.json" in refused("--resume", copy, "--epochs", "9")
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"momentum": 1}))
    assert "momentum" in refused("--resume", copy)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14@336px"])
def test_no_network(name, clip_package, offline, refused):
    """OpenAI's weights without network: what is missing and where it belongs, to bring it by hand."""
    message = refused("--clip", name)
    file = offline / ".cache" / "clip" / f"{name.replace('/', '-').replace('@', '-')}.pt"
    assert name in message and str(file) in message
    if clip_package == "clip":  # the names are those of the package itself
        import clip

        assert Path(clip.clip._MODELS[name]).name == file.name and set(clip.clip._MODELS) == set(OPENAI_CLIP)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_cut_off_download(content, clip_package, offline, refused):
    """A download that was cut off: which file to delete."""
    file = offline / ".cache" / "clip" / "ViT-B-32.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    message = refused("--clip", "ViT-B/32")
    assert str(file) in message and "delete" in message


@pytest.mark.parametrize("tag", ["laion2b_s34b_b79k", "laion400m_e32"])
def test_no_network_for_open_clip(tag, monkeypatch, refused):
    """The same for a model of open_clip: where its weights are to be had, and how to name the file, so that the model
    has the activation they were trained with."""

    def download(*arguments, **keywords):  # (the real one tries for a minute)
        raise OSError("no network")

    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr("open_clip.factory.download_pretrained", download)
    message, preset = refused("--clip", f"ViT-B-32:{tag}"), open_clip.get_pretrained_cfg("ViT-B-32", tag)
    assert (preset.get("hf_hub") or preset["url"]) in message
    (advised,) = re.findall(r"--clip ([\w-]+):", message)
    model = open_clip.get_model_config(advised)
    assert model.get("quick_gelu", False) == preset.get("quick_gelu", False)


def test_no_network_as_a_user_sees_it(offline, tmp_path):
    """The documented second command, without network: exit code 2 and one line."""
    done = call("--dataset", "cifar10", "--root", tmp_path / "data", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "cannot get cifar10" in line_of(done.stderr)
    assert not (tmp_path / "runs").exists()


def test_no_data(offline, refused, tmp_path):
    """A data set that cannot be downloaded: its name and the folder it belongs in. (The teacher is not to blame.)"""
    message = refused("--dataset", "mnist", "--clip", "offline", "--root", tmp_path / "data")
    assert "mnist" in message and str(tmp_path / "data") in message


@pytest.mark.parametrize("content", [{}, {"student": {}}, None])
def test_load_student(content, finished, tmp_path):
    """A file that is no model.pt is a UserError that names it, also a run's own checkpoint.pt."""
    file = tmp_path / "other.pt"
    torch.save(content, file) if content is not None else shutil.copy(finished[1] / "checkpoint.pt", file)
    with pytest.raises(tclip.UserError, match="other.pt"):
        load_student(file)
