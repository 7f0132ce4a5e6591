"""The report: what stands on the page is right, harmless whatever files are called, and stands without images."""

import base64
import html
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import rows_of, write_cifar10
from PIL import Image
from torchvision.datasets import CIFAR10

import tclip
from tclip_app import report
from tclip_app.report import write_report

NASTY = [
    "<script>parent.hacked = 1</script>", "\"quoted\" 'twice' & <b>bold</b>", "a very long name of many words " * 7,
    '"><img src=x onerror="parent.hacked = 1">', "תנין \u202egnp.exe", "one\nline\0or\ttwo", "nospaces" * 30,
    "$title $body {title} %s",
]  # fmt: skip
N = 120


def lay_run(root, /, classes=None, truth=True, names=None, size=12, **config):
    """A folder of images and of a run on it, whose teacher is often wrong and whose student is less so. Returns the
    run's folder and its tables: dict of probs (N, C) by teacher, label and student; and the truth (N,)."""
    classes = classes or [f"class {c}" for c in range(4)]
    draw, (photos, run) = torch.Generator().manual_seed(0), (root / "photos", root / "run")
    right = torch.randint(len(classes), (N,), generator=draw)

    def table(strength):
        shift = strength * torch.nn.functional.one_hot(right, len(classes))
        return (shift + 1.5 * torch.randn(N, len(classes), generator=draw)).softmax(1)

    said = dict(teacher=table(1.5), label=table(3), student=table(2.5))
    right[: 0 if truth is True else N if truth is False else truth] = -1
    names = names or [f"{i:03d}.png" for i in range(N)]
    for folder in (photos, run):
        folder.mkdir(parents=True)
    for i, name in enumerate(names):
        if not re.search(r"[\0/]", name):
            Image.new("RGB", (size, size), (i, 2 * i, 9)).save(photos / name, format="PNG")
    columns = dict(file=names)
    for who, prefix in (("teacher", "teacher_"), ("label", ""), ("student", "student_")):
        columns[f"{prefix}label"] = [classes[c] for c in said[who].argmax(1)]
        columns[f"{prefix}confidence"] = said[who].amax(1).tolist()
    columns |= dict(familiar=torch.rand(N, generator=draw).tolist())
    columns |= dict(truth=[classes[c] if c >= 0 else "" for c in right]) if truth else {}
    tclip.write_csv(run / "labels.csv", [dict(zip(columns, row)) for row in zip(*columns.values())])
    history = [dict(loss=9 - e, classification=2, contrastive=7 - e, labels_changed=0.05 * e) for e in (1, 2, 3)]
    exponents = [dict(epoch=e, trust=e // 3, sharpness=0.1 * e) for e in (1, 2, 3)]
    tclip.write_csv(run / "metrics.csv", [a | b for a, b in zip(exponents, history)])
    scores = {who: tclip.score(probs, right) for who, probs in said.items()}
    summary = {f"unlabeled_{who}_accuracy": score["accuracy"] for who, score in scores.items()}
    summary |= {f"unlabeled_{who}_per_class": dict(zip(classes, score["per_class"])) for who, score in scores.items()}
    same = said["teacher"].argmax(1) == said["student"].argmax(1)
    summary |= dict(agreement=same.float().mean().item(), seconds=61.2, device="cpu", torch="2.9", images=N)
    config = dict(dataset="photos", root=str(photos), clip="offline", lr=0.1) | config
    config |= dict(classes="\n".join(classes)) if config["dataset"] not in tclip.DATASETS else {}
    for name, content in (("config.json", config), ("summary.json", summary)):
        (run / name).write_text(json.dumps(content))
    return run, said, right.numpy()


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def plain(fragment):
    """The text of some HTML, on one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", fragment)).split())


def section_of(page, title):
    (found,) = re.findall(rf"<h2>{title}</h2>.*?</section>", page, re.S)
    return found


def percents(*shares):
    return [f"{100 * share:.1f} %" for share in shares]


def test_headline(tmp_path):
    """Accuracies, worst class, changed labels and confidence are those of a count by hand."""
    run, said, truth = lay_run(tmp_path)
    page, names = page_of(run), {who: probs.numpy().argmax(1) for who, probs in said.items()}
    before, label, after = (names[who] == truth for who in ("teacher", "label", "student"))
    (title,) = re.findall("<h1>.*</h1>", page)
    assert plain(title) == "Teacher {} → student {} right".format(*percents(before.mean(), after.mean()))
    assert f"student makes {100 * (1 - (~after).sum() / (~before).sum()):.0f}\xa0% fewer mistakes" in page
    worst = [min((ok[truth == c].mean(), c) for c in range(4)) for ok in (before, after)]
    changed, sure = (names["label"] != names["teacher"]).mean(), said["student"].numpy().max(1).mean()
    tiles = {plain(name): plain(value) for name, value in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)}
    assert tiles.pop("worst class") == " → ".join(f"{100 * share:.1f} % class {c}" for share, c in worst)
    names = "labels right", "labels changed", "student’s mean confidence"
    assert tiles == dict(zip(names, percents(label.mean(), changed, sure)))
    facts = plain(re.findall("<p class=facts>.*</p>", page)[0])
    assert facts == "photos · 120 images · 4 classes · teacher offline · 61 seconds on cpu"
    assert "labels changed 0.05 → 0.15, trust 0 → 1, sharpness 0.1 → 0.3" in section_of(page, "How the training went")


@pytest.mark.parametrize("truth", [True, False])
def test_tables(truth, tmp_path):
    """Class by class, the student's worst first, and the most frequent confusions, are those counted one by one."""
    run, said, right = lay_run(tmp_path, truth=truth)
    page, (teacher, student) = page_of(run), (said[who].numpy().argmax(1) for who in ("teacher", "student"))
    cells = re.findall("<tr><th scope=row><bdi>class (.)</bdi></th>(.*?)</tr>", section_of(page, "Class by class"))
    for c, shares in ((int(c), re.findall("<em>(.*?)</em>", text)) for c, text in cells):
        expected = [(who == c).mean() for who in (teacher, student)]
        expected += [(who[right == c] == c).mean() for who in (teacher, student)] if truth else []
        assert [plain(share) for share in shares] == percents(*expected)
    if truth:
        accuracy = [(student[right == int(c)] == int(c)).mean() for c, _ in cells]
        assert len(cells) == 4 and accuracy == sorted(accuracy)
    pairs, lists = (
        [(right, teacher), (right, student)] if truth else [(teacher, student)],
        re.findall("<ol>.*?</ol>", page),
    )
    assert len(lists) == len(pairs)
    pattern = r"<bdi>class (\d)</bdi> (?:now )?called <bdi>class (\d)</bdi> <em>(\d+) images?, (\d+)"
    for listed, (before, after) in zip(lists, pairs):
        items = [tuple(map(int, item)) for item in re.findall(pattern, listed)]
        counts = {(r, c): ((before == r) & (after == c)).sum() for r in range(4) for c in range(4) if r != c}
        assert [n for *_, n, _ in items] == sorted((n for n in counts.values() if n), reverse=True)[:12]
        assert all(counts[r, c] == n and share == round(100 * n / (before == r).sum()) for r, c, n, share in items)


def test_grids(tmp_path):
    """The surest changes, at most eight of a kind, and the least sure images, in order, with their names, a mark, and
    the very pixels."""
    run, said, truth = lay_run(tmp_path, ["class 0", "class 1"])
    page, names = page_of(run), {who: probs.numpy().argmax(1) for who, probs in said.items()}
    label, student = said["label"].numpy().max(1), said["student"].numpy().max(1)
    changed, kinds = [], []
    for i in np.argsort(-label, kind="stable"):
        kind = names["teacher"][i], names["label"][i]
        if kind[0] != kind[1] and kinds.count(kind) < 8:
            changed.append(i)
            kinds.append(kind)
    assert ((names["teacher"] == 1) & (names["label"] == 0)).sum() > 8
    for title, shown, who in (
        ("Surest changes", changed[:24], "label"),
        ("Where the student is least sure", np.argsort(student, kind="stable")[:24], "student"),
        (
            "Strangest images",
            np.argsort([float(row["familiar"]) for row in rows_of(run / "labels.csv")])[:12],
            "student",
        ),
    ):
        figures = re.findall("<figure>(.*?)</figure>", section_of(page, title), re.S)
        assert len(figures) == len(shown)
        for i, figure in zip(shown, figures):
            assert f'alt="{i:03d}.png"' in figure and f"class {names[who][i]}" in plain(figure)
            assert ("✓" if names[who][i] == truth[i] else f"✗ class {truth[i]}") in plain(figure)
            (data,) = re.findall('base64,(.*?)"', figure)
            picture = Image.open(io.BytesIO(base64.b64decode(data)))
            assert picture.size == (12, 12) and picture.getpixel((5, 5)) == (i, 2 * i, 9)


def test_images_are_gone(tmp_path):
    """The page says so, and stands without them; a single image that is gone leaves the others."""
    run, _, _ = lay_run(tmp_path)
    whole, name = (page := page_of(run)).count("<img"), re.findall('alt="(...).png"', page)[0]
    (tmp_path / "photos" / f"{name}.png").unlink()
    assert whole - 3 < page_of(run).count("<img") < whole and "no longer" in page_of(run)
    shutil.rmtree(tmp_path / "photos")
    assert page_of(run).count("<img") == 1 and f"{name}.png" in page_of(run)  # the curves are left


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_run_on_a_data_set(dataset, tmp_path, monkeypatch):
    """A run of tclip.py: pictures come from the data set, and nothing is downloaded."""
    if dataset == "digits":
        source = tclip.handwritten_digits(train=True)
        shown = dict(zip((f"{i:05d}" for i in source.indices), (image for image, _ in source)))
    else:
        write_cifar10(tmp_path / "data", N)
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.exists(path))
        shown = {f"{i:05d}": image for i, (image, _) in enumerate(CIFAR10(tmp_path / "data"))}
    monkeypatch.setattr(CIFAR10, "download", None)
    run, *_ = lay_run(tmp_path, names=list(shown)[:N], dataset=dataset, root=str(tmp_path / "data"))
    figures = re.findall(r'base64,([^"]*)" width=(\d+) height=\2 alt="(\d+)"', page_of(run))
    assert len(figures) == 60
    for data, _, name in figures:
        assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), shown[name].convert("RGB"))
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    assert page_of(run).count("<img") == (61 if dataset == "digits" else 1)


def test_no_finished_run(tmp_path):
    """Where no run has ended: one line."""
    run, *_ = lay_run(tmp_path)
    (run / "summary.json").unlink()
    with pytest.raises(tclip.UserError, match="no folder of a run that has ended"):
        write_report(run)


def test_nasty_names(tmp_path):
    """The page of nasty names has the same elements as that of plain ones: no name became markup."""
    usual, *_ = lay_run(tmp_path / "usual", [f"class {c}" for c in range(len(NASTY))])
    tclip.write_csv(usual / "skipped.csv", [dict(file=name, reason=name) for name in "abcdefgh"])
    names = [NASTY[i % len(NASTY)].replace("/", "∕") + str(i) for i in range(N)]
    other = dict(names=names, dataset=NASTY[0], clip=NASTY[3].replace("/", ""), lr=NASTY[1], size=400)
    nasty, *_ = lay_run(tmp_path / "nasty", NASTY, **other)
    tclip.write_csv(nasty / "skipped.csv", [dict(file=name, reason=name) for name in NASTY])
    pages, tags = [page_of(usual), page_of(nasty)], ("section", "h2", "table", "tr", "figure", "script")
    elements = [{tag: page.count(f"<{tag}") for tag in tags} for page in pages]
    assert elements[0] == elements[1] and elements[0]["script"] == 0
    for data in re.findall('image/jpeg;base64,(.*?)"', pages[1]):  # of large images the page holds small ones
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 160)
    assert pages[1].count("image/jpeg") > 24 and "image/jpeg" not in pages[0]
    assert "onerror=&quot;" in pages[1] and "<b>bold" not in pages[1] and "\u202e" not in pages[1]
    assert report.text('<a href="x">\'&amp;\n\n b') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;amp; b"
    assert report.text("a\u202eb\0c\udcffd\u2067e") == "a\ufffdb\ufffdc\ufffdd\ufffde"
