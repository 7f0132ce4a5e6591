"""Who names the images: another teacher's file, matched by name; the truth, for evaluation alone; and CLIP's cache."""

import csv
import json
import os
import pickle
import shutil
import sqlite3
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tclip
from tclip import Teacher, UserError, cached, main, match, read_pseudo_labels, square

TINY = ("--size", "8", "--arch", "resnet8", "--epochs", "2", "--label-neighbours", "3")
COLOURS = {"red": (200, 30, 20), "green": (10, 180, 40), "blue": (20, 40, 210)}
CLASSES = list(COLOURS)
GUARDED = ["=SUM(A1)", "+1", "-1", "@you", "\ttab", "\rreturn", "'=was guarded", "''+twice", "'plain", "plain=", "a'b"]


def call(*arguments):
    return main([str(argument) for argument in arguments])


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_labels(path, rows, columns=("file", "label", "confidence"), encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """30 small images in folders named like their colour: (path, names, one file of pseudo-labels, a third wrong)."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(30):
        colour = CLASSES[i % 3]
        (root / colour).mkdir(exist_ok=True)
        pixels = np.clip(np.array(COLOURS[colour]) + rng.integers(-60, 60, (8, 8, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(root / colour / f"{i}.png")
    names = tclip.Folder(root).names
    said = [CLASSES[(CLASSES.index(name.split("/")[0]) + (i % 3 == 0)) % 3] for i, name in enumerate(names)]
    rows = [(name, label, f"{0.5 + 0.01 * i:.2f}") for i, (name, label) in enumerate(zip(names, said))]
    return root, names, write_labels(root.parent / f"{root.name}.csv", rows)


def run(photos, out, *more, teacher=None):
    """A small run; returns the bytes of its model's tensors and of its labels.csv."""
    answers = ("--pseudo-labels", teacher or photos[2])
    assert call("--images", photos[0], *answers, "--out", out, "--device", "cpu", *TINY, *more) == 0
    return student_of(out), (out / "labels.csv").read_bytes()


def student_of(out):
    weights = tclip.read_tensors(out / "model.pt")["student"]
    return b"".join(tensor.numpy().tobytes() for tensor in weights.values())


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A small run with that file: (its folder, its student and labels)."""
    out = tmp_path_factory.mktemp("runs") / "first"
    return out, run(photos, out, "--classes", "red,green,blue")


# ----------------------------------------------------------------------------------------------------------------------
# Another teacher's answers


def save_npz(path, files, classes, probs, **more):
    np.savez(path, files=np.array(files), classes=np.array(classes), probs=probs, **more)
    return path


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_npz(kind, tmp_path):
    """An npz file of any precision: rows are its images, columns its classes, put in the order that was asked for."""
    probs = np.random.default_rng(0).dirichlet([1, 1, 1], 5).astype(kind)
    file = save_npz(tmp_path / "answers.npz", list("abcde"), ["blue", "red", "green"], probs)
    files, classes, ours = read_pseudo_labels(file)
    assert (files, classes, ours.dtype) == (list("abcde"), ["blue", "red", "green"], torch.float32)
    np.testing.assert_allclose(ours, probs.astype(float), atol=1e-3)
    torch.testing.assert_close(ours.sum(1), torch.ones(5))
    files, classes, ours = read_pseudo_labels(file, ["red", "green", "blue"])
    assert classes == ["red", "green", "blue"]
    np.testing.assert_allclose(ours, probs[:, [1, 2, 0]].astype(float), atol=1e-3)
    _, classes, ours = read_pseudo_labels(file, ["RED", "Green", " blue"])  # capitals and spaces do not matter
    np.testing.assert_allclose(ours, probs[:, [1, 2, 0]].astype(float), atol=1e-3)


def test_npz_of_scores(tmp_path):
    """Rows that do not sum to one are made to."""
    file = save_npz(tmp_path / "answers.npz", ["a", "b"], ["x", "y"], np.array([[3, 1], [0, 5]]))
    assert torch.equal(read_pseudo_labels(file)[2], torch.tensor([[0.75, 0.25], [0, 1]]))


def test_csv(tmp_path):
    """In a csv file the label has its confidence, and the other classes share the rest evenly; 1 where none is said."""
    file = write_labels(
        tmp_path / "answers.csv", [("a.png", "red", "0.7"), ("b.png", "blue", "")], encoding="utf-8-sig"
    )
    files, classes, probs = read_pseudo_labels(file, ["red", "green", "blue"])
    assert (files, classes) == (["a.png", "b.png"], ["red", "green", "blue"])
    torch.testing.assert_close(probs, torch.tensor([[0.7, 0.15, 0.15], [0, 0, 1]]))
    assert read_pseudo_labels(file)[1] == ["blue", "red"]  # without --classes: those that occur
    write_labels(file, [("green", "x,y.png", "more"), ("Red", "z.png", "")], ("label", "file", "note"))
    files, _, probs = read_pseudo_labels(file, ["red", "green", "blue"])
    assert files == ["x,y.png", "z.png"] and torch.equal(probs, torch.tensor([[0.0, 1, 0], [1, 0, 0]]))


GOOD = dict(files=np.array(["a", "b"]), classes=np.array(["red", "blue"]), probs=np.full((2, 2), 0.5))
HALF = [("a", "red", "0.5"), ("b", "blue", "0.5")]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(probs=np.full((2, 3), 0.3)), ["(2, 3)", "2 files", "2 classes"]),
        (dict(probs=np.full(2, 0.3)), ["(2,)"]),
        (dict(probs=np.array([[np.nan, 1], [0, 1]])), ["finite"]),
        (dict(probs=np.array([[np.inf, 1], [0, 1]])), ["finite"]),
        (dict(probs=np.array([[-0.1, 1.1], [0, 1]])), ["below zero"]),
        (dict(probs=np.array([[0, 0], [0, 1]])), ["all zero"]),
        (dict(probs=np.array([["x", "y"], ["z", "w"]])), []),
        (dict(files=np.array(["a", "a"])), ["a twice"]),
        (dict(files=np.array(["a"])), ["1 files"]),
        (dict(files=np.array([], str), probs=np.zeros((0, 2))), ["0 files"]),
        (dict(classes=np.array(["red", "blu"])), ["blu", "blue"]),
        (dict(classes=np.array(["red", "blue", "green"]), probs=np.full((2, 3), 0.3)), ["3 classes, not 2"]),
        (dict(classes=np.array(["red", "red"])), ["none twice"]),
        (dict(classes=np.array(["blue", "Blue_"])), ["none twice"]),
        (dict(classes=np.array([0, 1])), []),
        (dict(files=np.array([["a", "b"], ["c", "d"]])), []),
        (dict(classes=np.array([["red", "blue"]] * 2)), []),
        (dict(probs=None), ["probs"]),
    ],
)  # fmt: skip
def test_wrong_npz(changes, words, tmp_path):
    """Shapes that do not fit, what is no probability, other classes, a file twice: told with the name of the file."""
    content = {name: value for name, value in (GOOD | changes).items() if value is not None}
    np.savez(tmp_path / "answers.npz", **content)
    with pytest.raises(UserError) as error:
        read_pseudo_labels(tmp_path / "answers.npz", ["red", "blue"])
    assert "\n" not in str(error.value) and ("answers.npz" in str(error.value) or "none twice" in words)
    assert all(word in str(error.value) for word in words), error.value


def test_npz_with_a_class_twice(tmp_path):
    """One class of the file under two spellings does not stand for two of them."""
    np.savez(tmp_path / "answers.npz", **GOOD)
    with pytest.raises(UserError, match="2 classes, not 1: red, blue"):
        read_pseudo_labels(tmp_path / "answers.npz", ["Red", "red"])


@pytest.mark.parametrize(
    "rows, columns, words",
    [
        ([("a", "red", "1.2"), HALF[1]], None, ["1.2", "a "]),
        ([("a", "red", "-0.1"), HALF[1]], None, ["-0.1"]),
        ([("a", "red", "nan"), HALF[1]], None, ["nan"]),
        ([("a", "red", "much"), HALF[1]], None, ["much"]),
        ([*HALF, ("a", "blue", "0.5")], None, ["a twice", "line 4"]),
        ([("a", "rde", "0.5"), HALF[1]], None, ["'rde'", "red"]),
        (HALF, ("name", "label", "confidence"), ["file,label"]),
        ([], (), ["file,label"]),
        ([], None, []),
    ],
)  # fmt: skip
def test_wrong_csv(rows, columns, words, tmp_path):
    """The same for a csv file."""
    file = write_labels(tmp_path / "answers.csv", rows, ("file", "label", "confidence") if columns is None else columns)
    with pytest.raises(UserError) as error:
        match(["a", "b"], *read_pseudo_labels(file, ["red", "blue"])[::2])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\xff\xfe\0\0", b"file,label\n\xff,red\n"])
@pytest.mark.parametrize("ending", ["npz", "csv"])
def test_unreadable(content, ending, tmp_path):
    """Files that are cut off or of another kind, and no file at all: told with their name."""
    (tmp_path / f"answers.{ending}").write_bytes(content)
    with pytest.raises(UserError, match=f"answers.{ending}"):
        read_pseudo_labels(tmp_path / f"answers.{ending}", ["red", "blue"])
    with pytest.raises(UserError, match="missing"):
        read_pseudo_labels(tmp_path / f"missing.{ending}", ["red", "blue"])


class Bomb:
    """Unpickled, it makes a folder: what a hostile file would do worse."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("array", ["files", "classes", "probs"])
def test_no_code_in_npz_is_run(array, tmp_path):
    """An array of objects is pickled code: it is refused, and not run."""
    exploded = tmp_path / "exploded"
    hostile = np.array([[Bomb(str(exploded))] * 2] * 2, dtype=object)
    np.savez(tmp_path / "answers.npz", **GOOD | {array: hostile if array == "probs" else hostile[0]})
    with pytest.raises(UserError, match="answers.npz"):
        read_pseudo_labels(tmp_path / "answers.npz", ["red", "blue"])
    assert not exploded.exists()
    with pytest.raises(FileNotFoundError):  # the bomb is a real one
        exploded.rmdir()
    np.load(tmp_path / "answers.npz", allow_pickle=True)[array]
    assert exploded.exists()


@pytest.mark.parametrize("raw", [True, False])
def test_no_pickle_named_npz_is_run(raw, tmp_path):
    """Neither is a bare pickle with that ending, or one within the archive."""
    code = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    if raw:
        (tmp_path / "answers.npz").write_bytes(code)
    else:
        with zipfile.ZipFile(tmp_path / "answers.npz", "w") as archive:
            for name in ("files.npy", "classes.npy", "probs.npy"):
                archive.writestr(name, code)
    with pytest.raises(UserError, match="answers.npz"):
        read_pseudo_labels(tmp_path / "answers.npz")
    assert not (tmp_path / "exploded").exists()


def test_matched_by_name(photos, finished, tmp_path):
    """The order of the file's rows has no say: shuffled, it gives the same student and labels to the bit."""
    with open(photos[2], newline="") as file:
        header, *rows = csv.reader(file)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = write_labels(tmp_path / "shuffled.csv", [rows[i] for i in order], header)
    assert run(photos, tmp_path / "run", "--classes", "red,green,blue", teacher=shuffled) == finished[1]
    teacher = {row["file"]: row["teacher_label"] for row in rows_of(tmp_path / "run/labels.csv")}
    assert teacher == {name: label for name, label, _ in rows}


def test_npz_is_as_good_as_csv(photos, finished, tmp_path):
    """The same answers as npz, in another order of images and of classes, give the same run."""
    files, _, probs = read_pseudo_labels(photos[2], CLASSES)
    columns, order = [2, 0, 1], np.random.default_rng(2).permutation(len(files))
    named = [CLASSES[c] for c in columns], probs.numpy().astype(np.float64)[order][:, columns]
    file = save_npz(tmp_path / "answers.npz", [files[i] for i in order], *named)
    run(photos, tmp_path / "run", "--classes", "red,green,blue", teacher=file)
    for row, other in zip(rows_of(tmp_path / "run/labels.csv"), rows_of(finished[0] / "labels.csv")):
        assert row["file"] == other["file"] and row["teacher_label"] == other["teacher_label"]
        assert float(row["teacher_confidence"]) == pytest.approx(float(other["teacher_confidence"]), abs=2e-4)


def test_missing_and_unknown_names(capfd):
    """An image without an answer starts undecided; an answer without an image is told; and so is that none fits."""
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]])
    rows = match(["x", "c", "a"], ["a", "b", "c"], probs)
    assert torch.equal(rows, torch.tensor([[0.5, 0.5], [0.3, 0.7], [0.9, 0.1]]))
    error = capfd.readouterr().err
    assert "1 of 3 images have no pseudo-label, such as x" in error
    assert "1 pseudo-labels are of other files, such as b" in error
    assert torch.equal(match(["b", "a", "c"], ["a", "b", "c"], probs), probs[[1, 0, 2]])
    assert capfd.readouterr().err == ""
    with pytest.raises(UserError, match="photos/a.*a"):
        match(["photos/a", "photos/b"], ["a", "b", "c"], probs)


def test_undecided_stays_undecided(tmp_path):
    """An image that starts undecided is even over the classes; written with four digits and read again, it still has
    the label that was written: the label of a csv file is never less likely than another class."""
    file = write_labels(tmp_path / "answers.csv", [("a", "red", "0.3333"), ("b", "blue", "0.34")])
    _, _, probs = read_pseudo_labels(file, ["green", "red", "blue"])
    assert probs[0, 1] == probs[0].max() and probs[1].argmax() == 2


def test_results_are_pseudo_labels(photos, finished, tmp_path):
    """labels.csv of a run, and predictions.csv of its student, can be the teacher of the next run."""
    files = [finished[0] / "labels.csv"]
    assert call("--predict", photos[0], "--model", finished[0] / "model.pt", "--out", tmp_path / "named") == 0
    files.append(tmp_path / "named/predictions.csv")
    for i, file in enumerate(files):
        run(photos, tmp_path / f"next {i}", "--classes", "red,green,blue", teacher=file)
        rows, before = rows_of(tmp_path / f"next {i}/labels.csv"), rows_of(file)
        assert [row["teacher_label"] for row in rows] == [row["label"] for row in before]
        assert [row["file"] for row in rows] == photos[1] == [row["file"] for row in before]


def test_classes_in_other_words(photos, finished, tmp_path, capfd):
    """Class names are those of --classes in its order; capitals and underscores of the file do not matter."""
    with open(photos[2], newline="") as file:
        header, *rows = csv.reader(file)
    shouted = write_labels(
        tmp_path / "shouted.csv", [(name, f" {label.upper()}_", p) for name, label, p in rows], header
    )
    assert run(photos, tmp_path / "run", "--classes", "red,green,blue", teacher=shouted) == finished[1]
    capfd.readouterr()
    arguments = ("--pseudo-labels", photos[2], "--classes", "red,green,bleu", "--out", tmp_path / "wrong", *TINY)
    assert call("--images", photos[0], *arguments) == 2
    assert "'blue' is not among the classes; there is: bleu" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Names that a spreadsheet takes for formulas


@pytest.mark.parametrize("name", GUARDED)
def test_guarded_names(name):
    """No cell begins like a formula, and what was guarded comes back as it was, apostrophes of its own and all."""
    cell = tclip.guarded(name)
    assert cell[0] not in "=+-@\t\r" and tclip.unguarded(cell) == name
    assert (cell == name) == (name in ("'plain", "plain=", "a'b"))
    assert tclip.guarded(-1.5) == -1.5  # numbers stay numbers


@pytest.mark.skipif(os.name != "posix", reason="no such names there")
def test_guarded_round_trip(tmp_path):
    """Files with such names, in such classes: results are safe to open, and they find their images again."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate(GUARDED):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(photos / name, format="PNG")
    labels = [("=1+1", "-no")[i % 2] for i in range(len(GUARDED))]
    file = save_npz(tmp_path / "raw.npz", GUARDED, ["=1+1", "-no"], np.eye(2)[[i % 2 for i in range(len(GUARDED))]])
    expected = dict(zip(GUARDED, labels))
    for i in range(2):  # the second time, the teacher is the labels.csv of the first
        out = tmp_path / f"run {i}"
        run((photos, None, file), out, "--classes", "=1+1,-no", "--label-momentum", "1", "--class-prior", "none")
        rows = rows_of(out / "labels.csv")
        assert not any(cell[:1] in tuple("=+-@\t\r") for row in rows for cell in row.values())
        found = {tclip.unguarded(row["file"]): tclip.unguarded(row["teacher_label"]) for row in rows}
        assert found == expected
        file = out / "labels.csv"
    assert call("--predict", photos, "--model", out / "model.pt", "--out", tmp_path / "named") == 0
    rows = rows_of(tmp_path / "named/predictions.csv")
    assert not any(cell[:1] in tuple("=+-@\t\r") for row in rows for cell in row.values())
    assert {tclip.unguarded(row["file"]) for row in rows} == set(GUARDED)


# ----------------------------------------------------------------------------------------------------------------------
# Truth


def test_truth_is_for_evaluation_alone(photos, finished, tmp_path, capfd):
    """With the truth, with a shuffled one and with none the student is the same to the bit; the accuracies are not."""
    names, classes = photos[1], ("--classes", "red,green,blue")
    true = write_labels(tmp_path / "true.csv", [(name, name.split("/")[0]) for name in names], ("file", "label"))
    rolled = [(name, other.split("/")[0]) for name, other in zip(names, [*names[10:], *names[:10]])]
    shuffled = write_labels(tmp_path / "shuffled.csv", rolled, ("file", "label"))
    accuracies = {}
    for kind, truth in dict(folders="folders", true=true, shuffled=shuffled).items():
        assert run(photos, tmp_path / kind, *classes, "--truth", truth) == finished[1]
        accuracies[kind] = summary_of(tmp_path / kind)["teacher_accuracy"]
    assert (
        accuracies["true"] == accuracies["folders"] == pytest.approx(2 / 3, abs=0.05) and accuracies["shuffled"] < 0.5
    )
    assert summary_of(finished[0])["teacher_accuracy"] is None
    assert not {"inductive_accuracy", "teacher_inductive_accuracy"} & summary_of(finished[0]).keys()


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def test_accuracy_by_hand(photos, tmp_path, capfd):
    """Accuracies count the files whose truth is known, and only these."""
    names = photos[1]
    truth = write_labels(tmp_path / "truth.csv", [(n, n.split("/")[0]) for n in names[::2]], ("file", "label"))
    run(photos, tmp_path / "run", "--classes", "red,green,blue", "--truth", truth)
    rows, summary = rows_of(tmp_path / "run/labels.csv"), summary_of(tmp_path / "run")
    for column, key in (("teacher_label", "teacher_accuracy"), ("label", "label_accuracy")):
        right = [row[column] == row["file"].split("/")[0] for row in rows[::2]]
        assert summary[key] == pytest.approx(sum(right) / len(right))
    assert f"knows {len(names[::2])} of {len(names)} files" in capfd.readouterr().err


@pytest.mark.parametrize(
    "truth, word", [("folders", "tells nothing"), ("other.csv", "violet"), ("none.csv", "none.csv")]
)
def test_wrong_truth(truth, word, photos, tmp_path, capfd, monkeypatch):
    """A truth that knows none of the files, or other classes: told before an image is read."""
    monkeypatch.chdir(tmp_path)
    write_labels(tmp_path / "other.csv", [(photos[1][0], "violet")], ("file", "label"))
    monkeypatch.setattr(tclip, "read_images", lambda *_, **__: pytest.fail("images were read"))
    classes = "cat,dog" if truth == "folders" else "red,green,blue"
    arguments = ("--images", photos[0], "--clip", "offline", "--classes", classes, "--truth", truth, *TINY)
    assert call(*arguments, "--out", "run") == 2
    assert word in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Cache


def counting(weight=1.0, digest=b"first"):
    """A teacher whose features are the mean colour, and the list of the images that it was asked for."""
    asked = []

    def encode_images(pixels):
        asked.extend(pixels)
        return F.normalize(pixels.float().mean((2, 3)) * torch.tensor([1.0, weight, 1.0]) + 1, dim=1)

    def encode_texts(texts):
        rows = [[next((j for j, c in enumerate(CLASSES) if c in text), 0) == i for i in range(3)] for text in texts]
        return F.normalize(torch.tensor(rows).float() * (-1 if "not" in texts[0] else 1), dim=1)

    return Teacher(partial(square, size=8), encode_images, encode_texts, digest), asked


def some_views(n, seed=0):
    return torch.randint(0, 256, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_cache_encodes_an_image_once(tmp_path):
    """What was encoded is answered from the file, bit for bit, in any order; what is new alone is encoded."""
    teacher, asked = counting()
    views = some_views(10)
    first = cached(teacher, tmp_path).encode_images(views)
    assert torch.equal(first, teacher.encode_images(views))
    asked.clear()
    order = torch.tensor([3, 9, 0, 3])
    assert torch.equal(cached(teacher, tmp_path).encode_images(views[order]), first[order]) and not asked
    more = torch.cat([some_views(2, seed=1), views[:5]])
    assert torch.equal(cached(teacher, tmp_path).encode_images(more)[2:], first[:5]) and len(asked) == 2


def test_cache_knows_the_pixels_and_the_model(tmp_path):
    """One changed value in one pixel, or another digest of the weights: encoded anew."""
    teacher, asked = counting()
    views = some_views(3)
    cached(teacher, tmp_path).encode_images(views)
    asked.clear()
    views[1, 2, 7, 7] ^= 1
    assert torch.equal(cached(teacher, tmp_path).encode_images(views), teacher.encode_images(views))
    assert len(asked) == 1 + 3  # by the cache, and by the line above
    other, asked = counting(weight=3.0, digest=b"second")
    assert torch.equal(cached(other, tmp_path).encode_images(views), other.encode_images(views)) and len(asked) == 6


def test_digest_is_of_the_weights(tmp_path):
    """Other weights under the same name have another digest; the same weights always the same."""
    state = tclip.read_tensors(tclip.OFFLINE_CLIP)
    digests = []
    for change in (0, 0, 1):
        name = next(name for name in state if name.startswith("visual.") and state[name].is_floating_point())
        weight = state[name].clone()
        weight.view(-1)[-1] += change
        torch.save(state | {name: weight}, tmp_path / "clip.pt")
        digests.append(tclip.load_clip(str(tmp_path / "clip.pt")).digest)
    assert digests[0] == digests[1] != digests[2]


def test_interrupted_pass_keeps_what_it_had(tmp_path):
    """Ctrl-C in the third batch: the two before are not encoded again."""
    teacher, asked = counting()
    views, through = some_views(12).split(4), cached(teacher, tmp_path)
    for batch in views[:2]:
        through.encode_images(batch)

    def interrupted(pixels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(replace(teacher, encode_images=interrupted), tmp_path).encode_images(views[2])
    asked.clear()
    again = torch.cat([cached(teacher, tmp_path).encode_images(batch) for batch in views])
    assert len(asked) == 4 and torch.equal(again, teacher.encode_images(torch.cat(views)))


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be one" * 100, "cut", "other table"])
def test_damaged_cache(content, tmp_path):
    """A cache that is damaged: one line, with its path and both remedies."""
    teacher, _ = counting()
    file = tmp_path / "features.sqlite"
    if content == "other table":
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE features (a, b, c)")
        database.close()
    else:
        cached(teacher, tmp_path).encode_images(some_views(200))
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(UserError) as error:
        cached(teacher, tmp_path).encode_images(some_views(200))
    message = str(error.value)
    assert str(file) in message and "Delete it" in message and "--no-cache" in message and "\n" not in message


def test_cache_where_none_can_be(tmp_path):
    """A place that is no folder: the same."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="--no-cache"):
        cached(counting()[0], tmp_path / "file" / "cache")
    assert (tmp_path / "file").read_text() == "mine"


SECOND = """
import sys
sys.path.insert(0, {tests!r})
from test_annotators import cached, counting, some_views
through = cached(counting()[0], ".")
print("ready", flush=True)
for batch in some_views(240).flip(0).split(24):
    through.encode_images(batch)
"""


def test_two_processes_share_a_cache(nursery, tmp_path):
    """Two runs at once, over the same images from both ends: neither fails, and all is kept."""
    teacher, asked = counting()
    through = cached(teacher, tmp_path)
    other = nursery.start(SECOND.format(tests=str(Path(__file__).parent)), tmp_path)
    other.wait_until(lambda: "ready" in other.output)
    mine = torch.cat([through.encode_images(batch) for batch in some_views(240).split(24)])
    assert other.wait() == 0, other.output
    assert torch.equal(mine, teacher.encode_images(some_views(240)))
    asked.clear()
    assert torch.equal(through.encode_images(some_views(240)), mine) and not asked


@pytest.fixture
def teachers(monkeypatch):
    """Runs by the counting teacher, whose weight and digest are `teachers.weight`; `teachers.asked` is its list."""

    class Teachers:
        weight, asked = 1.0, []

    def load_clip(name, device="cpu"):
        teacher, asked = counting(Teachers.weight, repr(Teachers.weight).encode())
        Teachers.asked = asked
        return teacher

    monkeypatch.setattr(tclip, "load_clip", load_clip)
    return Teachers


def named_by_clip(photos, out, cache, *more):
    classes = () if "--classes" in more else ("--classes", "red,green,blue")
    arguments = ("--images", photos[0], "--clip", "offline", "--cache", cache, "--out", out, "--device", "cpu", *TINY)
    assert call(*arguments, *classes, *more) == 0
    return student_of(out), (out / "labels.csv").read_bytes()


def test_second_run_encodes_nothing(photos, teachers, tmp_path):
    """The second run asks CLIP for no image and ends in the same student and labels; --no-cache neither reads nor
    writes a cache, and gives the same as well."""
    cache = tmp_path / "cache"
    first = named_by_clip(photos, tmp_path / "first", cache)
    assert len(teachers.asked) == 30
    content = (cache / "features.sqlite").read_bytes()
    assert named_by_clip(photos, tmp_path / "second", cache) == first and not teachers.asked
    assert named_by_clip(photos, tmp_path / "third", cache, "--no-cache") == first and len(teachers.asked) == 30
    assert (cache / "features.sqlite").read_bytes() == content and os.listdir(cache) == ["features.sqlite"]
    assert named_by_clip(photos, tmp_path / "fourth", tmp_path / "none", "--no-cache") == first
    assert not (tmp_path / "none").exists()


def test_other_questions_get_other_answers(photos, teachers, tmp_path):
    """Class names and templates are asked anew, with the images from the cache; another model and a changed file are
    encoded. Each time the labels are those of a run without a cache."""
    cache, n = tmp_path / "cache", iter(range(20))
    named_by_clip(photos, tmp_path / "first", cache)
    seen = {(tmp_path / "first/labels.csv").read_bytes()}
    for more in (("--classes", "red,green,violet"), ("--templates", "not a {}.")):
        result = named_by_clip(photos, tmp_path / str(next(n)), cache, *more)
        assert not teachers.asked and result[1] not in seen
        seen.add(result[1])
        assert result == named_by_clip(photos, tmp_path / str(next(n)), cache, "--no-cache", *more)
    teachers.weight = 9.0
    result = named_by_clip(photos, tmp_path / str(next(n)), cache)
    assert len(teachers.asked) == 30 and result[1] not in seen
    assert result == named_by_clip(photos, tmp_path / str(next(n)), cache, "--no-cache")


def test_changed_file(photos, teachers, tmp_path):
    """A file whose content has changed under its old name is encoded again, alone."""
    copy = tmp_path / "photos"
    tclip_photos = (Path(shutil.copytree(photos[0], copy)), None, None)
    named_by_clip(tclip_photos, tmp_path / "first", tmp_path / "cache")
    before = rows_of(tmp_path / "first/labels.csv")
    file = copy / "red" / "0.png"
    stamp = file.stat()
    Image.new("RGB", (8, 8), COLOURS["blue"]).save(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # nor does its date tell
    named_by_clip(tclip_photos, tmp_path / "second", tmp_path / "cache")
    assert len(teachers.asked) == 1
    after = rows_of(tmp_path / "second/labels.csv")
    changed = [a["file"] for a, b in zip(before, after) if a["teacher_label"] != b["teacher_label"]]
    assert changed == ["red/0.png"]


def test_run_with_an_unusable_cache(photos, teachers, tmp_path, capfd):
    """The command line tells it in one line, before an image is read, and --no-cache goes on."""
    (tmp_path / "features.sqlite").write_bytes(b"not a database, not at all, not in the least" * 50)
    arguments = ("--images", photos[0], "--classes", "red,green,blue", "--clip", "offline", "--cache", tmp_path, *TINY)
    assert call(*arguments, "--out", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "--no-cache" in error and not (tmp_path / "run").exists()
    assert call(*arguments, "--out", tmp_path / "run", "--no-cache") == 0


def test_offline_clip_is_cached(photos, tmp_path):
    """The real offline CLIP, with words that it knows, from the cache and without: the same to the bit."""
    runs = []
    for i, more in enumerate(((), (), ("--no-cache",))):
        classes = ("--classes", "zero,one,two")
        runs.append(named_by_clip(photos, tmp_path / str(i), tmp_path / "cache", *classes, *more))
    assert runs[0] == runs[1] == runs[2]


def test_cache_needs_a_digest(tmp_path):
    """A teacher that cannot be told from another is not cached: it would get the other's features."""
    with pytest.raises(ValueError, match="digest"):
        tclip.cached(tclip.Teacher(None, None, None), tmp_path)
