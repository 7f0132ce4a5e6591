"""Other teachers' answers, the truth, class names and prompts: matched by name, and every mistake told in one line."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from conftest import NAMES, Bomb, rows_of
from PIL import Image

import tclip
from tclip import UserError
from tclip_app.answers import (
    class_prior,
    match,
    read_csv,
    read_labels,
    read_npz,
    read_pseudo_labels,
    read_truth,
    tell_unsaid,
)
from tclip_app.images import find


def test_names_come_back(tmp_path):
    """What tclip writes as csv is read again to the letter, and no cell of it is a formula for a spreadsheet."""
    rows = [dict(file=name, label=f"={name}") for name in NAMES]
    tclip.write_csv(tmp_path / "labels.csv", rows)
    assert read_csv(tmp_path / "labels.csv") == rows
    composed = [unicodedata.normalize("NFC", name) for name in NAMES]
    assert read_labels(tmp_path / "labels.csv") == {name: (f"={own}", 1) for name, own in zip(composed, NAMES)}
    cells = [cell for row in rows_of(tmp_path / "labels.csv") for cell in row.values()]
    assert not [cell for cell in cells if cell[0] in "=+-@\t\r"]


def test_pseudo_labels_of_csv(tmp_path):
    """What a confidence lacks to 1 goes to the other classes, evenly; a label stays the likeliest class, and is certain
    without one. Columns are in the order of the given classes, in any spelling."""
    content = "\ufefflabel,who,file,confidence\nDog,me,1,0.7,too many\ncat,,2,\nold_cow,,3,0\n"  # of a spreadsheet
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    files, classes, probs, features = read_pseudo_labels(tmp_path / "a.csv", ["cat", "dog", "Old cow"])
    assert files == ["1", "2", "3"] and classes == ["cat", "dog", "Old cow"] and features is None
    torch.testing.assert_close(probs, torch.tensor([[0.15, 0.7, 0.15], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    assert read_pseudo_labels(tmp_path / "a.csv")[1] == ["Dog", "cat", "old_cow"]
    with pytest.raises(UserError, match="'old_cow' is not among the classes"):
        read_pseudo_labels(tmp_path / "a.csv", ["cat", "dog"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("between", ",;\t")
def test_spreadsheets(between, encoding, tmp_path):
    """Excel writes columns, encodings and decimal commas by the country; a class has one name, however it is spelt."""
    rows = [["file", "label", "confidence"], ["é,;.png", "Cat ", '"0,7"'], ["2", "cat", "1"], ["3", "cat", "1"]]
    rows[1][0] = f'"{rows[1][0]}"'
    content = "\r\n".join(between.join(row) for row in [*rows, ["4", "CA\u0300T", "1"], ["5", "c\u00e0t", "1"]])
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    files, classes, probs, _ = read_pseudo_labels(tmp_path / "a.csv")
    assert files[0] == "é,;.png" and classes == ["C\u00c0T", "cat"]
    torch.testing.assert_close(probs, torch.tensor([[0.3, 0.7], [0, 1], [0, 1], [1, 0], [1, 0]]))


def test_decomposed_names(tmp_path, capsys):
    """macOS splits accents: files, classes and truth are the same names, spelt either way."""
    split, whole = "cafe\u0301", "caf\u00e9"
    for mine, theirs in ((split, whole), (whole, split)):
        (tmp_path / mine / mine).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / mine / mine / f"{mine}.png")
        names = list(find(tmp_path / mine))
        (tmp_path / "a.csv").write_text(f"file,label\n{theirs}/{theirs}.png,{theirs}\n", encoding="utf-8")
        files, _, probs, _ = read_pseudo_labels(tmp_path / "a.csv", [mine, "dog"])
        assert match(names, files, probs)[0].argmax(1).tolist() == [0]
        for truth in ("folders", str(tmp_path / "a.csv")):
            assert read_truth(truth, names, [theirs, "dog"]).tolist() == [0]
    assert not capsys.readouterr().err
    for name in (split, whole):  # both in one folder: neither is lost
        (tmp_path / "both" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "both" / name / "1").write_text(name)
    assert {name: path.read_text() for name, path in find(tmp_path / "both").items()} == {
        f"{name}/1": name for name in (split, whole)
    }


PRIORS = {  # as it is given, or the content of a file
    "none": "none", "uniform": "uniform", "1,2,3": "1,2,3", "dog:3, Cat:1,cow : .5": "1,3,.5",
    "name,share\ndog,3\ncow,.5\n\ncat,1\n": "1,3,.5", 'dog:3\ncat:1\n"cow":.5': "1,3,.5",
    "cow\t1\ndog;2\ncat\t3": "3,2,1", "1,2": "3 shares, .* for cat, dog, cow", "dog:1,cat:2": "'cow' has 0 shares",
    "dog:1,cat:1,cow:1,Dog:2": "'dog' has 2",
    "dog:1,cat:2,hen:3": "'hen' is not among", "dog:1,cat:2,cow": "as in cat:0.7", "dog:1,cat:2,cow:x": "3 shares",
    "dog:1,cat:2,cow:0": "3 shares, none", "shares.txt": "as in cat:0.7",
}  # fmt: skip


@pytest.mark.parametrize("given", PRIORS)
def test_class_prior(given, tmp_path):
    """Shares by the classes' names, of the command line or of a file, become numbers in the order of the classes."""
    prior, classes, expected = given, ["cat", "dog", "cow"], PRIORS[given]
    if "\n" in given:
        prior = str(tmp_path / "shares")
        (tmp_path / "shares").write_text(given)
    if " " in expected:
        with pytest.raises(UserError, match=f"^--class-prior[^\n]*{expected}"):
            class_prior(prior, classes)
    else:
        assert class_prior(prior, classes) == expected


def test_unsaid_classes(capsys):
    """What the teacher never says is told; an image that is undecided says nothing."""
    tell_unsaid(torch.tensor([[0.5, 0.5, 0], [0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]]), ["a", "b", "c"])
    assert "never says b: 1 of 3" in capsys.readouterr().err
    tell_unsaid(torch.tensor([[0.1, 0.2, 0.7], [1 / 3, 1 / 3, 1 / 3]]), ["a", "b", "c"])
    assert "calls every image c" in capsys.readouterr().err
    tell_unsaid(torch.eye(3), ["a", "b", "c"])
    assert not capsys.readouterr().err


def arrays():
    """The arrays of an npz file of a teacher of three classes."""
    rng, names = np.random.default_rng(0), dict(files=np.array(list("12345")), classes=np.array(["a", "b", "c"]))
    return names | dict(probs=rng.dirichlet([1, 1, 1], 5), features=rng.normal(size=(5, 4)))


def test_pseudo_labels_of_npz(tmp_path):
    """Probabilities are made to sum to 1, features to unit length, and columns follow the given classes."""
    given = arrays() | dict(probs=arrays()["probs"].round(2))
    np.savez(tmp_path / "a.npz", **given)
    files, classes, probs, features = read_pseudo_labels(
        (tmp_path / "a.npz").rename(tmp_path / "A.NPZ"), ["c", "a", "b"]
    )
    assert files == given["files"].tolist() and classes == ["c", "a", "b"]
    expected = given["probs"] / given["probs"].sum(1, keepdims=True)
    np.testing.assert_allclose(probs, expected[:, [2, 0, 1]], rtol=1e-5)
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)
    np.testing.assert_allclose(features, unit, rtol=1e-5)
    assert probs.dtype == features.dtype == torch.float32
    np.savez(tmp_path / "b.npz", **{name: given[name] for name in ("files", "classes", "probs")})
    assert read_npz(tmp_path / "b.npz")[3] is None
    for wrong in (["a", "b"], ["a", "b", "d"], ["a", "b", "c", "d"]):
        with pytest.raises(UserError, match="A.NPZ"):
            read_pseudo_labels(tmp_path / "A.NPZ", wrong)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "first line"), (b"file,label\n", "rows"), (b"name,label\na,b\n", "file,label"), (None, "cannot read"),
        (b"file,label\na,b\na,c\n", "a twice"), (b"file,label\na,\n", "row 1"), (b"file,label\na\n", "row 1"),
        *((f"file,label,confidence\na,b,{wrong}\n".encode(), "confidence of a") for wrong in ("1.5", "-1", "nan", "x")),
        (b"file,label\ncaf\xe9,b\n", "save it in UTF-8"), (dict(probs=np.ones((4, 3))), "probs are"),
        (dict(probs=np.ones((5, 2))), "probs are"), (dict(probs=np.zeros((5, 3))), "sum to 0"),
        (dict(probs=np.ones(5)), "probs are"), (dict(probs=np.full((5, 3), np.nan)), "probs are"),
        (dict(probs=np.full((5, 3), 14.5)), "sum to 43.5, not to 1: of logits save the softmax"),
        (dict(files=np.array(list("12345"), object)), "to_numpy.str"),
        (dict(probs=-np.ones((5, 3))), "below zero"), (dict(probs=np.full((5, 3), "1")), "probs are"),
        (dict(features=np.ones((4, 3))), "features are"), (dict(features=np.full((5, 3), np.inf)), "features are"),
        (dict(files=np.array(["x"] * 5)), "x twice"), (dict(files=np.arange(5)), "lists of strings"),
        (dict(classes=np.arange(3)), "lists of strings"), (dict(files=None), "no files"),
        (dict(classes=np.array([Bomb("exploded")] * 3)), "cannot read"), (dict(probs=None), "no probs"),
        (0.0, "cannot read"), (0.5, "cannot read"), (0.99, "cannot read"),
    ],
)  # fmt: skip
def test_wrong_files(content, word, tmp_path, monkeypatch):
    """Each is told in one line that names the file; a pickle in it is not opened; neither is what is cut off."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("a.npz" if isinstance(content, (dict, float)) else "a.csv")
    if isinstance(content, dict):
        np.savez(path, **{name: array for name, array in (arrays() | content).items() if array is not None})
    elif isinstance(content, float):
        np.savez(path, **arrays())
        os.truncate(path, int(content * path.stat().st_size))
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}.*({word})|({word}).*{path.name}"):
        read_pseudo_labels(path)
    assert not os.path.exists("exploded")


def test_match(capsys):
    """By name, in the order of the images. Images without an answer start undecided, and are told, as are answers to
    other files; where no name fits it is an error."""
    probs, features = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]), torch.eye(3)
    mine, rows = match(["c", "x", "a"], ["a", "b", "c"], probs, features)
    assert torch.equal(mine, torch.stack([probs[2], torch.tensor([0.5, 0.5]), probs[0]]))
    assert torch.equal(rows, torch.stack([features[2], torch.zeros(3), features[0]]))
    told = capsys.readouterr().err
    assert "1 of 3 images have no pseudo-label, such as x" in told and "1 pseudo-labels are of other files" in told
    assert match(["a"], ["a"], probs[:1])[1] is None and not capsys.readouterr().err
    with pytest.raises(UserError, match="none of the 1 images.*z is not like a"):
        match(["z"], ["a"], probs[:1])


def test_truth(tmp_path, capsys):
    """From a csv file or from the folders' names, -1 where unknown, which is told; nothing known is an error."""
    (tmp_path / "t.csv").write_text("file,label\nb.png,Dog\na.png,cat\nelsewhere.png,cat\n")
    assert read_truth(str(tmp_path / "t.csv"), ["a.png", "b.png", "c.png"], ["cat", "dog"]).tolist() == [0, 1, -1]
    assert "knows 2 of 3 files" in capsys.readouterr().err
    names = ["x/cat/1.png", "sea_lake/cat.png", "cat/dog/2.png", "3.png"]
    assert read_truth("folders", names, ["cat", "Sea Lake"]).tolist() == [0, 1, -1, -1]
    assert read_truth(None, names, ["cat", "dog"]).tolist() == [-1] * 4
    for truth in ("folders", str(tmp_path / "t.csv")):
        with pytest.raises(UserError, match="tells nothing of the 1 files"):
            read_truth(truth, ["other.png"], ["cat", "dog"])
    with pytest.raises(UserError, match="'Dog' is not among the classes"):
        read_truth(str(tmp_path / "t.csv"), ["a.png"], ["cat", "cow"])
