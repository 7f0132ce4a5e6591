"""What one does with a trained student: name new images without CLIP, and take it elsewhere as ONNX or safetensors."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import tclip
from tclip import load_student, main, predict

COLOURS = {"red": (200, 30, 20), "green": (10, 180, 40), "blue": (20, 40, 210), "grey": (120, 120, 120)}
NO_CLIP = "sys.modules.update(dict.fromkeys(['clip', 'open_clip', 'sklearn', 'tclip_report']))"  # import them: an error


def call(*arguments):
    return main([str(argument) for argument in arguments])


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lay_photos(root, n=40, sides=(16, 16)):
    """Small images of four colours, and the csv file of a teacher who knows them: (folder, file)."""
    rng = np.random.default_rng(0)
    root.mkdir()
    rows = [("file", "label")]
    for i in range(n):
        label = list(COLOURS)[i % 4]
        pixels = np.clip(np.array(COLOURS[label]) + rng.integers(-40, 40, (*sides, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{i:02d}.png")
        rows.append((f"{i:02d}.png", label))
    with open(root.parent / "teacher.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root, root.parent / "teacher.csv"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run: (its folder, the folder of the images)."""
    root = tmp_path_factory.mktemp("use")
    photos, teacher = lay_photos(root / "photos")
    settings = ("--size", 16, "--arch", "resnet8", "--epochs", 8, "--batch-size", 16, "--device", "cpu", "--lr", 0.5)
    given = ("--images", photos, "--pseudo-labels", teacher, "--classes", ",".join(COLOURS))
    assert call(*given, *settings, "--out", root / "run") == 0
    return root / "run", photos


@pytest.fixture
def model(trained, tmp_path):
    """A copy of its model.pt, alone in a folder."""
    (tmp_path / "model").mkdir()
    return shutil.copy(trained[0] / "model.pt", tmp_path / "model" / "model.pt")


def pixels_of(files):
    return torch.stack([torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) for file in files])


def test_predict_without_clip(trained, nursery, tmp_path):
    """--predict names a folder where no CLIP is installed: each readable file in a row, the others in skipped.csv."""
    photos = shutil.copytree(trained[1], tmp_path / "new")
    (photos / "broken.png").write_bytes(b"broken")
    arguments = ("--predict", photos, "--model", trained[0] / "model.pt", "--out", "named", "--device", "cpu")
    child = nursery.tclip(*arguments, cwd=tmp_path, before=NO_CLIP)
    assert child.wait() == 0, child.output
    assert "predictions.csv" in child.output and "1 of 41 files" in child.output
    assert {file.name for file in (tmp_path / "named").iterdir()} == {"predictions.csv", "skipped.csv"}
    assert [row["file"] for row in rows_of(tmp_path / "named/skipped.csv")] == ["broken.png"]
    rows = rows_of(tmp_path / "named/predictions.csv")
    assert [row["file"] for row in rows] == sorted(file.name for file in trained[1].iterdir())
    assert sum(row["label"] == list(COLOURS)[i % 4] for i, row in enumerate(rows)) > 30  # it has learned something


def test_predictions(trained, tmp_path):
    """The three likeliest classes and their probabilities, best first, are those of the student's own arithmetic."""
    assert call("--predict", trained[1], "--model", trained[0] / "model.pt", "--out", tmp_path / "named") == 0
    rows = rows_of(tmp_path / "named/predictions.csv")
    assert list(rows[0]) == ["file", "label", "confidence", "label_2", "confidence_2", "label_3", "confidence_3"]
    student, classes = load_student(trained[0] / "model.pt")
    with torch.no_grad():
        probs = student(pixels_of(trained[1] / row["file"] for row in rows).float() / 255)[0].softmax(1)
    for row, mine in zip(rows, probs):
        order = mine.argsort(descending=True)[:3].tolist()
        assert [row[key] for key in ("label", "label_2", "label_3")] == [classes[c] for c in order]
        said = [float(row[key]) for key in ("confidence", "confidence_2", "confidence_3")]
        assert said == pytest.approx(mine[order].tolist(), abs=1e-3)


def test_predict_one_file(trained, tmp_path, monkeypatch, capsys):
    """--predict takes a single image, too, and puts the answer where nothing else lies."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "predict-05").mkdir(parents=True)
    assert call("--predict", trained[1] / "05.png", "--model", trained[0] / "model.pt") == 0
    written = tmp_path / "runs" / "predict-05-2" / "predictions.csv"
    assert [row["file"] for row in rows_of(written)] == ["05.png"] and "predict-05-2" in capsys.readouterr().out


def test_two_classes(tmp_path):
    """Of two classes there are two columns."""
    photos, _ = lay_photos(tmp_path / "photos", 4)
    student = tclip.Student("resnet8", 2, 8)
    model = dict(arch="resnet8", size=8, classes=["a", "b"], student=student.state_dict())
    torch.save(model, tmp_path / "model.pt")
    assert call("--predict", photos, "--model", tmp_path / "model.pt", "--out", tmp_path / "named") == 0
    columns = ["file", "label", "confidence", "label_2", "confidence_2"]
    assert list(rows_of(tmp_path / "named/predictions.csv")[0]) == columns


@pytest.mark.parametrize(
    "arguments",
    [
        ["--predict", "photos"],
        ["--model", "model.pt"],
        ["--export", "onnx"],
        ["--predict", "no", "--model", "model.pt"],
    ],
)
def test_wrong_use(arguments, model, tmp_path, monkeypatch, capfd):
    """--predict and --export need a --model, and it one of them; a folder that is not there is told."""
    monkeypatch.chdir(tmp_path / "model")
    assert call(*arguments) == 2
    assert capfd.readouterr().err.count("\n") == 1 and os.listdir() == ["model.pt"]


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("action", ["predict", "export"])
@pytest.mark.parametrize("place", ["whole", "classes", "old format"])
def test_model_with_code_in_it(action, place, trained, tmp_path, capfd):
    """A model.pt from elsewhere that would run code is refused, and none of its code is run."""
    hostile, content = Bomb(tmp_path / "exploded"), tclip.read_tensors(trained[0] / "model.pt")
    content = hostile if place == "whole" else content | {"classes": hostile}
    file = tmp_path / "model.pt"
    torch.save(content, file, _use_new_zipfile_serialization=place != "old format")
    arguments = ("--predict", trained[1]) if action == "predict" else ("--export", "onnx")
    assert call(*arguments, "--model", file) == 2
    error = capfd.readouterr().err
    assert "model.pt" in error and error.count("\n") == 1 and not (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """model.onnx and model.safetensors, written by the command line."""
    pytest.importorskip("onnxscript", reason="no onnxscript")
    pytest.importorskip("safetensors", reason="no safetensors")
    file = shutil.copy(trained[0] / "model.pt", tmp_path_factory.mktemp("exported") / "model.pt")
    assert call("--export", "onnx", "--model", file) == 0
    return file.with_suffix(".onnx")


@pytest.mark.parametrize("n", [1, 3, 17])
def test_onnx(n, trained, exported):
    """ONNX Runtime gives tclip's own probabilities, from uint8 pixels, for a batch of any size."""
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime")
    session = runtime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [3, 16, 16])
    assert (returned.name, returned.type) == ("probs", "tensor(float)")
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    pixels[0] = pixels_of([trained[1] / "01.png"])[0]
    (probs,) = session.run(None, {"pixels": pixels.numpy()})
    student, classes = load_student(trained[0] / "model.pt")
    np.testing.assert_allclose(probs, predict(student, pixels), atol=1e-5)
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["classes"]) == classes == list(COLOURS)
    assert (about["arch"], about["size"]) == ("resnet8", "16")


def test_onnx_is_one_whole_file(exported):
    """The weights are within the file, the model is valid, and nothing else is left beside it."""
    onnx = pytest.importorskip("onnx", reason="no onnx")
    onnx.checker.check_model(onnx.load(exported), full_check=True)
    assert {file.name for file in exported.parent.iterdir()} == {"model.pt", "model.onnx", "model.safetensors"}


def test_safetensors(trained, exported):
    """The weights come back to the bit, and with the metadata they are a student again."""
    safetensors = pytest.importorskip("safetensors.torch", reason="no safetensors")
    from safetensors import safe_open

    file = exported.with_suffix(".safetensors")
    with safe_open(file, "pt") as content:
        about = content.metadata()
    student, classes = load_student(trained[0] / "model.pt")
    again = tclip.Student(about["arch"], len(json.loads(about["classes"])), int(about["size"])).eval()
    again.load_state_dict(safetensors.load_file(file))
    assert json.loads(about["classes"]) == classes
    assert all(torch.equal(a, b) for a, b in zip(student.state_dict().values(), again.state_dict().values()))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(predict(student, pixels), predict(again, pixels))


def test_export_needs_its_packages(model, monkeypatch, capfd):
    """Without them: one line with the command that installs them."""
    monkeypatch.delitem(sys.modules, "tclip_export", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call("--export", "onnx", "--model", model) == 2
    error = capfd.readouterr().err
    assert "pip install" in error and "onnxscript" in error and error.count("\n") == 1


ALONE = """
import runpy, sys
sys.modules.pop("tclip")
sys.modules.update(dict.fromkeys(["clip", "open_clip", "sklearn", "tclip_report"]))
sys.argv = ["tclip.py", *{argv!r}]
runpy.run_path("tclip.py", run_name="__main__")
"""


def test_one_file_alone(nursery, tmp_path):
    """tclip.py, copied alone into an empty folder, trains on pseudo-labels, resumes and predicts: no CLIP, nothing
    else of the project. Resumed, it ends in the same student."""
    photos, teacher = lay_photos(tmp_path / "photos", 12)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tclip.__file__, alone / "tclip.py")
    settings = ["--size", "8", "--arch", "resnet8", "--epochs", "2", "--device", "cpu", "--label-neighbours", "3"]
    given = ["--images", "../photos", "--pseudo-labels", "../teacher.csv", "--classes", ",".join(COLOURS)]
    results = []
    for argv in (
        [*given, *settings, "--out", "run"],
        ["--resume", "run"],
        ["--predict", "../photos", "--model", "run/model.pt", "--out", "named"],
    ):
        child = nursery.start(ALONE.format(argv=argv), alone)
        assert child.wait() == 0, child.output
        results.append((alone / "run/model.pt").read_bytes())
        if argv[0] == given[0]:
            (alone / "run/model.pt").unlink()
    assert results[0] == results[1] and len(rows_of(alone / "named/predictions.csv")) == 12
    assert {file.name for file in alone.iterdir()} - {"__pycache__"} == {"tclip.py", "run", "named"}
    expected = {"config.json", "checkpoint.pt", "metrics.csv", "labels.csv", "model.pt", "summary.json"}
    assert {file.name for file in (alone / "run").iterdir()} == expected


def test_results_are_not_overwritten(trained, capfd):
    """--predict does not write over what lies in the folder that it is given."""
    before = {file.name: file.read_bytes() for file in trained[0].iterdir()}
    assert call("--predict", trained[1], "--model", trained[0] / "model.pt", "--out", trained[0]) == 2
    assert "is not empty" in capfd.readouterr().err
    assert before == {file.name: file.read_bytes() for file in trained[0].iterdir()}


def test_named_link_is_followed(trained, model, tmp_path):
    """A link to an image is followed where it is what was named, wherever it leads."""
    (tmp_path / "link.png").symlink_to(trained[1] / "00.png")
    assert call("--predict", tmp_path / "link.png", "--model", model, "--out", tmp_path / "named") == 0
    assert [row["file"] for row in rows_of(tmp_path / "named/predictions.csv")] == ["00.png"]


@pytest.mark.parametrize(
    "arguments, word",
    [
        (("--images", ""), "--images is empty"),
        (("--resume", ""), "--resume is empty"),
        (("--images", "x" * 300, "--classes", "a,b"), "too long"),
        (("--predict", "x" * 300, "--model", "model/model.pt"), "too long"),
        (("--predict", ".", "--model", "none.pt"), "no such file"),
        (("--images", ".", "--classes", "a,b"), "among the images"),
    ],
)
def test_mistakes(arguments, word, model, tmp_path, monkeypatch, capfd):
    """Unset shell variables, impossible names, results amid the images: one line, no traceback."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("photo.png")
    assert call(*arguments) == 2
    error = capfd.readouterr().err
    assert error.startswith("tclip: ") and error.count("\n") == 1 and word in error
