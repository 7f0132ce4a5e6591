"""What to expect of a run without truth: the estimate, the warnings, and where they are told."""

import json
import re

import pytest
import torch
from PIL import Image

import tclip
from tclip_app import outlook
from tclip_app.cli import main


def test_expected_accuracy():
    """By hand: halfway between how often the student's choice is the labels', and the mean probability of its choices,
    the teacher's where it agrees with the student, the labels' elsewhere; of the labels the other way round. A teacher
    without confidences is not believed more than the rule believes it."""
    teacher = torch.tensor([[0.6, 0.4, 0.0], [0.7, 0.1, 0.2], [0.1, 0.1, 0.8]])
    labels = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]])
    student = torch.tensor([[0.9, 0.0, 0.1], [0.4, 0.6, 0.0], [1.0, 0.0, 0.0]])  # agrees, does not, does not
    assert outlook.expected_accuracy(teacher, labels, student) == pytest.approx((2 / 3 + (0.6 + 0.5 + 0.3) / 3) / 2)
    told = outlook.summary(teacher, labels, student, list("abc"))
    assert told["expected_student_accuracy"] == outlook.expected_accuracy(teacher, labels, student)
    assert told["expected_label_accuracy"] == pytest.approx((2 / 3 + (0.6 + 0.6 + 0.8) / 3) / 2)
    certain = torch.eye(3)[[0, 0, 2]]  # believed 20 : 1 : 1
    found = outlook.expected_accuracy(certain, labels, student)
    assert found == pytest.approx((2 / 3 + (20 / 22 + 0.5 + 0.3) / 3) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "teacher, labels, student, told",
    [
        ("abcabc", "abcabc", "abcaba", []),
        ("aaaaaa", "abcabc", "abcabc", ["the teacher calls every image a", "agree on 33.3%.*33.3% by chance"]),
        ("ababab", "abcabc", "ababab", ["the teacher never says c: 1 of 3", "the student never says c: 1 of 3"]),
        ("abcabc", "bbbbbb", "abcabc", ["every label is b"]),
        ("aabbcc", "aabbcc", "bcacab", ["agree on 0.0%.*33.3% by chance"]),
    ],
)
def test_warnings(teacher, labels, student, told):
    """What looks bad is told, once each, and a run that looks well is not spoken ill of."""
    numbers = (torch.tensor(["abc".index(name) for name in said]) for said in (teacher, labels, student))
    found = outlook.warnings(*numbers, list("abc"))
    assert len(found) == len(told) and all(re.search(line, sentence) for line, sentence in zip(told, found))


def test_told(tmp_path, capsys):
    """Terminal, summary and report tell the same estimate, as one, and warn; and the truth changes nothing of it."""
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 9, 9)).save(tmp_path / f"photos/{i:02d}.png")
    rows = [dict(file=f"{i:02d}.png", label="<a>", confidence=0.7) for i in range(12)]
    tclip.write_csv(tmp_path / "said.csv", rows)
    tclip.write_csv(tmp_path / "truth.csv", [row | dict(label="b") for row in rows])
    how = "--classes <a>,b --size 8 --arch resnet8 --epochs 2 --batch-size 6 --views writing --device cpu".split()
    how = ["train", str(tmp_path / "photos"), "--pseudo-labels", str(tmp_path / "said.csv"), *how]
    main([*how, "--out", str(tmp_path / "run")])
    told, found = capsys.readouterr(), json.loads((tmp_path / "run/summary.json").read_text())
    assert f"right on some {found['expected_student_accuracy']:.0%}" in found["outlook"] in told.out
    assert "estimate" in found["outlook"] and "care: the teacher calls every image <a>" in told.err
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert found["outlook"] in page and "<bdi>the teacher calls every image &lt;a&gt;</bdi>" in page
    main([*how, "--out", str(tmp_path / "known"), "--truth", str(tmp_path / "truth.csv")])
    known = json.loads((tmp_path / "known/summary.json").read_text())
    assert known["unlabeled_student_accuracy"] is not None
    assert [known[name] for name in ("outlook", "warnings")] == [found[name] for name in ("outlook", "warnings")]
