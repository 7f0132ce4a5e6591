"""The command `tclip` from end to end: runs on folders of images, how they go on, and how mistakes are answered."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import matplotlib
import numpy as np
import open_clip
import pytest
import torch
from conftest import coloured, rows_of
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay

import tclip
from tclip_app import fonts, train
from tclip_app.cli import main
from tclip_app.files import load_student, write_whole

DIGITS = tclip.DATASETS["digits"]["classes"]
COLOURS = ["red", "green", "blue"]
FILES = {"config.json", "images.json", "skipped.csv", "checkpoint.pt", "metrics.csv", "labels.csv", "model.pt"}
FILES |= {"summary.json", "noise.png", "report.html"}


def call(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Arguments of a small run with everything in it: images, one of them unreadable, pseudo-labels, and truth."""
    root, (pixels, probs, _) = tmp_path_factory.mktemp("given"), coloured(60, size=12)
    (root / "photos").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "photos" / f"{i:02d}.png")
    (root / "photos" / "broken.png").write_bytes(b"broken")
    said = [dict(label=COLOURS[c], confidence=p) for p, c in zip(*(x.tolist() for x in probs.max(1)))]
    tclip.write_csv(root / "teacher.csv", [dict(file=f"{i:02d}.png") | row for i, row in enumerate(said)])
    tclip.write_csv(root / "truth.csv", [dict(file=f"{i:02d}.png", label=COLOURS[i % 3]) for i in range(60)])
    tclip.write_csv(root / "known.csv", [dict(file=f"{i:02d}.png", label=COLOURS[(i + 1) % 3]) for i in (4, 9)])
    files = ["train", root / "photos", "--pseudo-labels", root / "teacher.csv", "--truth", root / "truth.csv"]
    files += ["--labels", root / "known.csv"]  # which are wrong: only who trusts them says so
    how = "--classes red,green,blue --class-prior 0.3,0.3,0.4 --size 8 --arch resnet8 --epochs 4 --batch-size 16"
    return [*files, *how.split(), *"--label-neighbours 5 --device cpu --views writing".split()]


@pytest.fixture(scope="module")
def whole(given, tmp_path_factory):
    """The folder of that run, never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    call(*given, "--out", run)
    return run


def same_results(run, whole):
    """Student and labels are bit for bit those of the uninterrupted run, and nothing is left over."""
    assert {file.name for file in run.iterdir()} == FILES
    for name in ("labels.csv", "skipped.csv", "images.json"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    mine, theirs = (torch.load(folder / "model.pt", weights_only=True)["student"] for folder in (run, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_digits_named_by_clip(tmp_path, monkeypatch, capsys):
    """The offline CLIP names digits in files: labels, truth, report; CLIP sees an image once; and labels.csv is a
    teacher itself."""
    monkeypatch.chdir(tmp_path)
    digits = load_digits()
    for i in range(80):
        name, gray = f"{DIGITS[digits.target[i]]}/={i}.png", (digits.images[i] * 255 / 16).astype(np.uint8)
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(gray).save(tmp_path / "photos" / name)
    (tmp_path / "classes.txt").write_text("\n".join(DIGITS))
    small = "--size 8 --arch resnet8 --epochs 1 --device cpu --views writing".split()
    arguments = [
        "train",
        "photos",
        *"--classes classes.txt --clip offline --cache cache --truth folders".split(),
        *small,
    ]
    call(*arguments, "--templates", "a photo of the digit {}.")
    assert {file.name for file in (tmp_path / "runs/photos").iterdir()} == FILES - {"skipped.csv"}
    rows, summary = rows_of("runs/photos/labels.csv"), json.loads((tmp_path / "runs/photos/summary.json").read_text())
    assert len(rows) == 80 and all(row["truth"] == row["file"].split("/")[0] for row in rows)
    right = np.mean([row["teacher_label"] == row["truth"] for row in rows])
    assert right == pytest.approx(summary["unlabeled_teacher_accuracy"]) and right > 0.5
    assert f"teacher {right:.1%}" in capsys.readouterr().out

    seen, encode = [], tclip.Clip.encode_images
    monkeypatch.setattr(tclip.Clip, "encode_images", lambda clip, x: seen.append(len(x)) or encode(clip, x))
    call(*arguments, "--templates", "a photo of the digit {}.")
    assert sum(seen) == 4 and rows_of("runs/photos-2/labels.csv") == rows  # the four tell whether it is the same CLIP
    call("train", "photos", *"--pseudo-labels runs/photos/labels.csv --classes classes.txt --out fed".split(), *small)
    assert [row["teacher_label"] for row in rows_of("fed/labels.csv")] == [row["label"] for row in rows]


def test_predictions(whole, given, tmp_path, monkeypatch, nursery):
    """Without any CLIP: the three likeliest classes, best first, are those of the student's own arithmetic. Of a single
    image, too, into the next free folder."""
    code = "import sys; sys.modules.update(clip=None, open_clip=None)"  # import them: an error
    child = nursery.tclip("predict", given[1], "--model", whole / "model.pt", cwd=tmp_path, before=code)
    assert child.wait() == 0 and "1 of 61 files" in child.output, child.output
    rows = rows_of(tmp_path / "runs/predict-photos/predictions.csv")
    columns = ["file", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3", "familiar"]
    assert list(rows[0]) == columns
    student, classes = load_student(whole / "model.pt")
    pixels = torch.stack([tclip.square(Image.open(given[1] / row["file"]), 8) for row in rows])
    for row, probs in zip(rows, student(pixels.float() / 255)[0].softmax(1)):
        order = probs.argsort(descending=True).tolist()
        assert [row[f"label{suffix}"] for suffix in ("", "_2", "_3")] == [classes[c] for c in order]
        assert float(row["confidence"]) == pytest.approx(probs.max().item(), abs=1e-4)
    monkeypatch.chdir(tmp_path)
    for folder in ("predict-05", "predict-05-2"):
        call("predict", given[1] / "05.png", "--model", whole / "model.pt", "--device", "cpu")
        (row,) = rows_of(tmp_path / "runs" / folder / "predictions.csv")
        assert row in rows and row["file"] == "05.png"


def test_known_labels(whole):
    """What is known stays, whatever teacher and truth say; other labels may move."""
    rows = {row["file"]: row for row in rows_of(whole / "labels.csv")}
    known = {"04.png": "blue", "09.png": "green"}
    assert all(rows[name]["label"] == label and float(rows[name]["confidence"]) > 0.99 for name, label in known.items())
    assert all(rows[name]["teacher_label"] != label != rows[name]["truth"] for name, label in known.items())
    right = [row["label"] == row["truth"] for name, row in rows.items() if name not in known]
    assert np.mean(right) > 0.9


CUT = """
import os, tclip
works, count = dict(replace=os.replace, write_csv=tclip.write_csv), 0
def cut(work, path, file, *arguments):
    global count
    count += str(path).endswith("{name}")
    if count == {nth}:
        os.path.exists(file) and os.truncate(file, os.path.getsize(file) // 2)  # half had reached the disk
        os.kill(os.getpid(), {signal})
    works[work](*arguments)
os.replace = lambda draft, path: cut("replace", path, draft, draft, path)
tclip.write_csv = lambda path, rows: cut("write_csv", path, path, path, rows)
"""
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # a checkpoint is larger
SLOW = "import time; work = {0}\n{0} = lambda *a, **k: print('begun', flush=True) or time.sleep(.2) or work(*a, **k)"


@pytest.mark.parametrize(
    "before, interrupt",
    [(CUT.format(name=name, nth=nth, signal=9), False) for name, nth in
     [("images.json", 1), ("checkpoint.pt", 1), ("checkpoint.pt", 3), ("labels.csv", 1)]]
    + [(CUT.format(name="metrics.csv", nth=2, signal=2), False), (FULL, False)]
    + [(SLOW.format(name), True) for name in ("tclip_app.images.read_image", "tclip.augment")],
    ids="images checkpoint checkpoint3 labels Ctrl-C full reading training".split(),
)  # fmt: skip
def test_goes_on(before, interrupt, given, whole, nursery, tmp_path):
    """After a power cut, Ctrl-C or a full disk, at whatever file: the run ends as if it had never stopped."""
    child = nursery.tclip(*given, "--out", "run", cwd=tmp_path, before=before)
    if interrupt:
        child.wait_until(lambda: "begun" in child.output)
        child.send(signal.SIGINT)
    assert child.wait() in (1, -signal.SIGKILL), child.output
    if before != FULL and child.code == 1:
        assert "Traceback" not in child.output and "--resume run" in child.output, child.output
    child = nursery.tclip("train", "--resume", "run", cwd=tmp_path)
    assert child.wait() == 0, child.output
    same_results(tmp_path / "run", whole)


def test_write_whole(tmp_path):
    """Where the disk is full: one line, and what was there before stays."""
    write_whole(tmp_path / "a", lambda file: file.write(b"whole"))
    with pytest.raises(tclip.UserError, match="cannot write .*a: .*No space left"):
        write_whole(tmp_path / "a", lambda file: file.write(b"half") and open("/dev/full", "w").write("x" * 100_000))
    assert (tmp_path / "a").read_bytes() == b"whole"


def without_near(checkpoint):
    """A checkpoint whose labels lack what has been kept since."""
    state, file = torch.load(io.BytesIO(checkpoint), weights_only=True), io.BytesIO()
    del state["labels"]["near"]
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, change, word",
    [("config.json", lambda x: x[:50], "config.json cannot be read"), ("config.json", lambda x: b"[]", "of another"),
     ("config.json", lambda x: x.replace(b"strict", b"severe"), "of another command or version"),
     ("checkpoint.pt", lambda x: x[: len(x) // 2], "checkpoint.pt is cut off"),
     ("checkpoint.pt", lambda x: b"", "checkpoint.pt is cut off"),
     ("checkpoint.pt", without_near, "checkpoint.pt is of another version")],
)  # fmt: skip
def test_damaged_run(name, change, word, whole, tmp_path):
    """What cannot go on is told in one line, and is not touched."""
    run = shutil.copytree(whole, tmp_path / "run")
    (run / name).write_bytes(change((run / name).read_bytes()))
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(tclip.UserError, match=word) as error:
        call("train", "--resume", run)
    assert "\n" not in str(error.value) and before == {file.name: file.read_bytes() for file in run.iterdir()}


def test_moved(given, whole, tmp_path, monkeypatch):
    """Images, run and truth may lie elsewhere when a run goes on; its report then finds them there."""
    monkeypatch.chdir(tmp_path)
    for path in (given[1], given[3], given[5], given[7]):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / f"moved {path.name}")
    shutil.copytree(whole, "elsewhere")
    gone = dict(root="/gone", truth="/gone", pseudo_labels="/gone", labels="/gone")
    config = json.loads((whole / "config.json").read_text()) | gone
    (tmp_path / "elsewhere/config.json").write_text(json.dumps(config))
    os.remove("elsewhere/labels.csv")
    with pytest.raises(tclip.UserError, match="gone"):
        call("train", "--resume", "elsewhere")
    places = "--truth", "moved truth.csv", "--pseudo-labels", "moved teacher.csv", "--labels", "moved known.csv"
    call("train", "moved photos", "--resume", "elsewhere", *places)
    same_results(tmp_path / "elsewhere", whole)
    assert json.loads((tmp_path / "elsewhere/config.json").read_text())["root"] == str(tmp_path / "moved photos")
    os.remove("elsewhere/report.html")
    call("report", "elsewhere")
    assert (tmp_path / "elsewhere/report.html").read_text().count("<img") > 24


def test_other_images(given, whole, tmp_path):
    """A run goes on with the images that it began with, and with no others."""
    photos, run = shutil.copytree(given[1], tmp_path / "photos"), shutil.copytree(whole, tmp_path / "run")
    for other, word in (("00 new", "1 are new, such as 00 new.png"), ("00", "1 are gone .* such as 07.png")):
        shutil.copy(photos / "07.png", photos / f"{other}.png") if other == "00 new" else os.remove(photos / "07.png")
        with pytest.raises(tclip.UserError, match=word):
            call("train", photos, "--resume", run)
        (photos / "00 new.png").unlink(missing_ok=True)
    same_results(run, whole)


def test_two_processes(given, nursery, tmp_path):
    """As torchrun starts them: the first reads the images, the other takes them over, one writes the results."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    code = "import os; os.environ.update(RANK='{0}', LOCAL_RANK='{0}', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', "
    code += f"MASTER_PORT='{port}', TORCHELASTIC_RUN_ID='x'); import tclip_app.images as i\n"
    code += "r = i.read_image; i.read_image = lambda *a: print('read by {0}') or r(*a)"
    children = [nursery.tclip(*given, cwd=tmp_path, before=code.format(rank)) for rank in (0, 1)]
    assert [child.wait() for child in children] == [0, 0], children[0].output + children[1].output
    assert "read by 0" in children[0].output and "read by 1" not in children[1].output
    assert "results in" in children[0].output and "results in" not in children[1].output
    assert {file.name for file in (tmp_path / "runs/photos").iterdir()} == FILES
    assert os.listdir(tmp_path / "runs") == ["photos"]


def test_bugs_keep_their_traceback(given, nursery, tmp_path):
    """An error that nobody foresaw is no advice to the user: it is shown where it happened."""
    for name in ("tclip_app.images.tclip.square", "tclip_app.answers.match", "tclip_app.report.headline"):
        bug = f"def bug(*a, **k): raise KeyError('a bug')\n{name} = bug"
        child = nursery.tclip(*given, "--out", name, cwd=tmp_path, before=bug)
        assert child.wait() == 1 and re.search("Traceback.*KeyError: 'a bug'", child.output, re.S), child.output


@pytest.mark.parametrize(
    "arguments, word",
    [
        ("train", "needs a folder"), ("train photos", "names of the cl"), ("train photos --classes a.x", "a.x: th"),
        ("train photos --classes a,A", "two classes"), ("train photos --classes a,b --templates x", "--templates"),
        ("train none --classes a,b", "no such folder"), ("train photos --classes a,b --size 4", "--size 4"),
        ("train . --classes a,b", "among the images"), ("train photos --classes a,b --out photos/x", "among the"),
        ("train photos --pseudo-labels no.csv", "no.csv"), ("train photos --classes a,b --arch x", "--arch x"),
        ("train photos --classes a,b --clip offline", "digits only"), ("train photos --resume none", "config.json"),
        ("train --resume none --epochs 3", "--epochs"), ("predict photos", "--model"), ("report photos", "no config"),
        ("predict none --model m.pt", "none: there is no"), ("predict photos --model m.pt", "m.pt"),
        ("export m.pt", "m.pt: there is no"), ("report none", "none"), ("predict photos --model m.pt --device x", "x:"),
        ("train  --classes a,b", "FOLDER is empty"), ("train photos --resume ", "resume is empty"),
        ("train texts --pseudo-labels a.csv --arch resnet8", "none of 1 files"), ("train empty --classes a,b", "no f"),
        *((f"train photos --classes a,b --class-prior {prior}", "--class-prior .*2 shares, .* for a, b")
          for prior in ("1,2,3", ".5", "1,x", "1,0", "1,1e-9", "0,0", "1,nan", "1,inf", "even")),
        ("train photos --classes a,b --out a.csv/x", "a.csv/x: Not a"), ("train photos --resume a.csv", "config.json"),
        ("train photos --classes a,b --out " + 300 * "x", "name too long"),
        ("train photos --classes a,b,B", "'b' and 'B'"), ("train photos --classes a,b,b", "'b' is named 2 times"),
        *((f"train photos --pseudo-labels a.csv --arch x --{s}", f"--{s.split()[0]} has no effect")
          for s in ("clip ViT-B/32", "templates {}", "cache x")),
        ("train photos --classes a,b --label-momentum 1 --label-neighbours 3", "--label-neighbours has no effect"),
        ("train photos --classes a,b --c3l-weight 0 --temperature 1", "--temperature has no effect"),
        ("train photos --pseudo-labels a.csv --labels none.csv", "none.csv"),
        ("train photos --pseudo-labels a.csv --labels other.csv", "--labels .*other.csv tells nothing of the 1 files"),
        ("train photos --pseudo-labels a.csv --labels mule.csv", "mule.csv: 'mule' is not among the classes a, b"),
        ("train lines --pseudo-labels a.csv --arch resnet8 --strict", "cannot read new line.png"),
    ],
)  # fmt: skip
def test_mistakes(arguments, word, tmp_path, monkeypatch):
    """Each is answered by one line that says what to mend."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "texts", "empty", "lines"):
        os.mkdir(name)
    Image.new("RGB", (9, 9)).save("photos/1.png")
    for name in ("texts/1.png", "lines/new\nline.png"):
        (tmp_path / name).write_text("text")
    (tmp_path / "a.csv").write_text("file,label\n1.png,a\n2.png,b\n")
    (tmp_path / "other.csv").write_text("file,label\n3.png,a\n")
    (tmp_path / "mule.csv").write_text("file,label\n1.png,mule\n")
    with pytest.raises(tclip.UserError, match=f"(?i){word}") as error:
        call(*arguments.split(" "))
    assert "\n" not in str(error.value)


def test_places(given, whole, tmp_path, monkeypatch):
    """~ is the home, also after a =; a run's folder, and files in it, stand for each other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = shutil.copytree(whole, tmp_path / "home/run")
    shutil.copy(given[1] / "05.png", run.parent)
    os.remove(run / "labels.csv")
    call("train", "--resume", "~/run/checkpoint.pt")
    same_results(run, whole)
    call("report", "~/run/report.html")
    call("predict", "~/05.png", "--model=~/run", "--out=~/said", "--device", "cpu")
    assert rows_of("home/said/predictions.csv")[0]["file"] == "05.png" and os.listdir() == ["home"]


UNREAD = "import os; read, write = os.pipe(); os.close(read); os.dup2(write, 1)"


@pytest.mark.parametrize("before", ["sys.stdout.reconfigure(encoding='cp1252')", "sys.stderr = None", UNREAD])
def test_streams(before, given, whole, nursery, tmp_path):
    """Whatever the terminal is, or where there is none, a run ends well."""
    child = nursery.tclip(*given, "--out", "日本", cwd=tmp_path, before=f"import sys; {before}")
    assert child.wait() == 0 and "Error" not in child.output, child.output
    same_results(tmp_path / "日本", whole)
    assert (r"\u65e5\u672c" if "cp1252" in before else "" if before == UNREAD else "日本") in child.output


def test_user_without_a_name(tmp_path, monkeypatch):
    """As in a container: the command starts, and asks for a place for CLIP's features. (Here without docstrings.)"""
    code = "import pwd; pwd.getpwuid = lambda uid: {}[uid]; import tclip_app.cli as cli; cli.main()"
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (9, 9)).save(photos / "1.png")
    arguments = "train", photos, "--classes", "a,b", "--out", tmp_path / "run"
    environment = {
        name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    }
    how = dict(cwd=Path(tclip.__file__).parent, env=environment, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-OO", "-c", code, *arguments], **how)
    assert done.returncode == 1 and not (tmp_path / "run").exists() and "Traceback" not in done.stderr
    assert done.stderr.endswith("\ncannot write in ~/.cache/tclip: no home; choose another --cache, or none\n")


def test_fonts(capsys):
    """Class names are drawn in a font that has them; where there is none pictures have no names, which is told."""
    assert fonts.settings_for(["cat", "caf\u00e9"]) == {}
    has = {font.name: set(get_font(font.fname).get_charmap()) for font in fontManager.ttflist}
    other = min(has["STIXGeneral"] - has["DejaVu Sans"])
    chosen = fonts.settings_for(["cat", chr(other)])["font.family"]
    assert chosen[0] == "sans-serif" and other in has[chosen[1]] and not capsys.readouterr().err
    with matplotlib.rc_context(fonts.settings_for(["cat", "\U000e0fff"])):
        ax = ConfusionMatrixDisplay(np.eye(2), display_labels=["cat", "\U000e0fff"]).plot(ax=Figure().subplots()).ax_
    assert not any(tick.label1.get_visible() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks())
    assert capsys.readouterr().err.count("noise.png has no names") == 1


def test_texts_that_clip_cuts(capsys):
    """Descriptions that CLIP does not read to their ends are told; two that are one to it are an error."""
    clip, long = types.SimpleNamespace(tokenize=open_clip.tokenize), "very " * 80
    train.whole_texts(clip, ["cat", "dog"], ["a photo of a {}.", "{}"])
    assert not capsys.readouterr().err
    train.whole_texts(clip, ["cat", f"dog {long}", f"{long}"], ["a photo of a {}."])
    assert "not the ends of 2 classes, such as 'dog very" in capsys.readouterr().err
    with pytest.raises(tclip.UserError, match="77 tokens, .*'very .*cat' and 'very .*dog' are the same"):
        train.whole_texts(clip, [f"{long}cat", f"{long}dog"], ["a photo of a {}.", "{}"])


def test_write_protected(given, whole, tmp_path, monkeypatch):
    """Where nothing can be written: one line, before anything is read."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    for arguments in ([*given, "--out", tmp_path / "a/b"], ["train", "--resume", whole]):
        with pytest.raises(tclip.UserError, match="cannot write in .*write-protected"):
            call(*arguments)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("command", ["", "train", "predict", "report", "export"])
def test_help(command, capsys):
    """--help fits a screen, and explains all settings of the method, too."""
    with pytest.raises(SystemExit) as end:
        main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and len(text.splitlines()) <= 45 and max(map(len, text.splitlines())) < 140
    names = set(tclip.Config.__dataclass_fields__) - {"dataset", "root"} if command == "train" else ()
    assert all(f"--{name.replace('_', '-')} " in text for name in names)
