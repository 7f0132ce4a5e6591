"""The report: what stands on the page is right, harmless whatever files are called, and stands without images."""

import base64
import html
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import tclip
from tclip_app import report
from tclip_app.report import write_report

NASTY = [
    "<script>parent.hacked = 1</script>",
    "\"quoted\" 'twice' & <b>bold</b>",
    '"><img src=x onerror="parent.hacked = 1">',
    "תנין \u202egnp.exe",
    "one\nline\0or\ttwo",
    "nospaces" * 30,
    "a very long name of many words " * 7,
    "$title $body {title} %s",
]
N = 120


def lay_run(root, classes=None, truth=True, names=None, size=12, **config):
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
    rows = []
    for i, name in enumerate(names):
        rows.append(dict(file=name))
        for who, prefix in (("teacher", "teacher_"), ("label", ""), ("student", "student_")):
            rows[-1][f"{prefix}label"] = classes[said[who][i].argmax()]
            rows[-1][f"{prefix}confidence"] = said[who][i].max().item()
        rows[-1] |= dict(truth=classes[right[i]] if right[i] >= 0 else "") if truth else {}
    tclip.write_csv(run / "labels.csv", rows)
    history = [dict(loss=9 - e, classification=2, contrastive=7 - e, labels_changed=0.05 * e) for e in (1, 2, 3)]
    tclip.write_csv(run / "metrics.csv", [dict(epoch=e + 1) | row for e, row in enumerate(history)])
    scores = {who: tclip.score(probs, right) for who, probs in said.items()}
    summary = {f"unlabeled_{who}_accuracy": score["accuracy"] for who, score in scores.items()}
    summary |= {f"unlabeled_{who}_per_class": dict(zip(classes, score["per_class"])) for who, score in scores.items()}
    same = said["teacher"].argmax(1) == said["student"].argmax(1)
    summary |= dict(agreement=same.float().mean().item(), seconds=61.2, device="cpu", torch="2.9", images=N)
    config = dict(dataset="photos", root=str(photos), clip="offline", classes="\n".join(classes), lr=0.1) | config
    for name, content in (("config.json", config), ("summary.json", summary)):
        (run / name).write_text(json.dumps(content))
    return run, said, right.numpy()


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def plain(fragment):
    """The text of some HTML, on one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", fragment)).split())


def tiles_of(page):
    return {plain(name): plain(value) for name, value in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)}


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
    assert tiles_of(page) == {
        "labels right": percents(label.mean())[0],
        "worst class": " → ".join(f"{100 * share:.1f} % class {c}" for share, c in worst),
        "labels changed": percents(changed)[0],
        "student’s mean confidence": percents(sure)[0],
    }
    facts = plain(re.findall("<p class=facts>.*</p>", page)[0])
    assert facts == "photos · 120 images · 4 classes · teacher offline · 61 seconds on cpu"


@pytest.mark.parametrize("truth", [False, 50])
def test_unknown_truth(truth, tmp_path):
    """Without truth: agreement, and what that does not mean. With some: how many images it is known of."""
    run, said, _ = lay_run(tmp_path, truth=truth)
    page = page_of(run)
    if truth:
        assert "120 unlabeled images, of which the true class of 70 is known" in page and "with a mark" not in page
        return
    agreed = (said["teacher"].argmax(1) == said["student"].argmax(1)).float().mean().item()
    assert f"agree on <b>{100 * agreed:.1f}\xa0%</b> of 120 images" in page and "Agreement is not accuracy" in page
    assert "✓" not in page and "named right" not in page and "now called" in page


def test_class_by_class(tmp_path):
    """Shares and accuracies of each class, the student's worst first, each with bars of their length."""
    run, said, truth = lay_run(tmp_path, [f"class {c}" for c in range(20)])
    section, names = section_of(page_of(run), "Class by class"), [said[w].numpy().argmax(1) for w in said]
    teacher, _, student = names
    expected = {}
    for c in range(20):
        shares = [(teacher == c).mean(), (student == c).mean()]
        expected[f"class {c}"] = shares + [(who[truth == c] == c).mean() for who in (teacher, student)]
    longest = max([(truth == c).mean() for c in range(20)] + [s for row in expected.values() for s in row[:2]])
    found = re.findall("<tr><th scope=row><bdi>(.*?)</bdi></th>(.*?)</tr>", section)
    found = {name: re.findall(r"width:([\d.]+)%.*?<em>([\d.]+)", cells) for name, cells in found}
    assert list(found) == sorted(expected, key=lambda name: expected[name][3])
    for name, row in expected.items():
        lengths = [row[0] / longest, row[1] / longest, *row[2:]]
        assert found[name] == [(f"{100 * length:.1f}", f"{100 * share:.1f}") for length, share in zip(lengths, row)]
    assert "<summary>4 more classes</summary>" in section


@pytest.mark.parametrize("truth", [True, False])
def test_confusions(truth, tmp_path):
    """The most frequent confusions are those counted one by one."""
    run, said, right = lay_run(tmp_path, truth=truth)
    teacher, student = (said[who].numpy().argmax(1) for who in ("teacher", "student"))
    pairs = [(right, teacher), (right, student)] if truth else [(teacher, student)]
    lists = re.findall("<ol>.*?</ol>", page_of(run))
    assert len(lists) == len(pairs)
    for listed, (before, after) in zip(lists, pairs):
        items = re.findall(
            r"<bdi>class (\d)</bdi> (?:now )?called <bdi>class (\d)</bdi> <em>(\d+) images?, (\d+)", listed
        )
        counts = {(r, c): ((before == r) & (after == c)).sum() for r in range(4) for c in range(4) if r != c}
        assert [int(n) for *_, n, _ in items] == sorted((n for n in counts.values() if n), reverse=True)[:12]
        for r, c, n, share in items:
            assert counts[int(r), int(c)] == int(n) and round(100 * int(n) / (before == int(r)).sum()) == int(share)


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
    whole = page_of(run).count("<img")
    name = re.findall('alt="(...).png"', page_of(run))[0]
    (tmp_path / "photos" / f"{name}.png").unlink()
    assert whole - 3 < page_of(run).count("<img") < whole and "no longer" in page_of(run)
    shutil.rmtree(tmp_path / "photos")
    assert page_of(run).count("<img") == 1 and f"{name}.png" in page_of(run)  # the curves are left
    config = json.loads((run / "config.json").read_text()) | dict(dataset="cifar10")
    del config["classes"]
    (run / "config.json").write_text(json.dumps(config))
    assert (
        page_of(run).count("<img") == 1 and not (tmp_path / "photos").exists()
    )  # of a data set: nothing is downloaded


def test_run_on_a_data_set(tmp_path):
    """A run of tclip.py: pictures come from the data set."""
    source, names = tclip.open_dataset("digits")
    run, *_ = lay_run(tmp_path, names=names[:N], dataset="digits")
    config = json.loads((run / "config.json").read_text())
    del config["classes"]
    (run / "config.json").write_text(json.dumps(config))
    figures = re.findall(r'base64,([^"]*)" width=112 height=112 alt="(\d+)"', page_of(run))
    assert len(figures) == 48
    for data, name in figures:
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
        assert np.array_equal(picture, source[names.index(name)][0])


def test_skipped_files_and_settings(tmp_path):
    """The first fifty of the skipped files with their reasons, and every setting."""
    run, *_ = lay_run(tmp_path)
    tclip.write_csv(run / "skipped.csv", [dict(file=f"={i}.jpg", reason=f"broken {i}") for i in range(60)])
    page = page_of(run)
    assert re.findall(r"<bdi>=(\d+)\.jpg</bdi></th><td><bdi>broken (\d+)</bdi>", page) == [
        (str(i),) * 2 for i in range(50)
    ]
    assert "and 10 more" in page and "60 files skipped" in page
    for name, value in json.loads((run / "config.json").read_text()).items():
        assert f"<bdi>{name}</bdi></th><td><bdi>{report.text(value)}</bdi>" in page


def test_no_finished_run(tmp_path):
    """Where no run has ended: one line. A fault in the program is no such thing."""
    run, *_ = lay_run(tmp_path)
    for name in ("labels.csv", "summary.json"):
        (run / name).rename(run / "kept")
        with pytest.raises(tclip.UserError, match="no folder of a run that has ended"):
            write_report(run)
        (run / "kept").rename(run / name)
    (run / "summary.json").write_text("{}")
    with pytest.raises(KeyError):
        write_report(run)


def nasty_run(root, **keywords):
    """A run in which everything that comes from outside tries to be something else."""
    names = [NASTY[i % len(NASTY)].replace("/", "∕") + str(i) for i in range(N)]
    run, *_ = lay_run(
        root, NASTY, names=names, dataset=NASTY[0], clip=NASTY[2].replace("/", ""), lr=NASTY[1], **keywords
    )
    tclip.write_csv(run / "skipped.csv", [dict(file=name, reason=name) for name in NASTY])
    return run


def test_nasty_names(tmp_path):
    """The page of nasty names has the same elements as that of plain ones: no name became markup."""
    usual, *_ = lay_run(tmp_path / "usual", [f"class {c}" for c in range(len(NASTY))])
    tclip.write_csv(usual / "skipped.csv", [dict(file=name, reason=name) for name in "abcdefgh"])
    pages = [page_of(usual), page_of(nasty_run(tmp_path / "nasty", size=400))]
    elements = [
        {tag: page.count(f"<{tag}") for tag in ("section", "h2", "table", "tr", "figure", "script")} for page in pages
    ]
    assert elements[0] == elements[1] and elements[0]["script"] == 0
    for data in re.findall('image/jpeg;base64,(.*?)"', pages[1]):  # of large images the page holds small ones
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (160, 160)
    assert pages[1].count("image/jpeg") > 24 and "image/jpeg" not in pages[0]
    assert "onerror=&quot;" in pages[1] and "<b>bold" not in pages[1] and "\u202e" not in pages[1]
    assert report.text('<a href="x">\'&amp;\n\n b') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;amp; b"
    assert report.text("a\u202eb\0c\udcffd\u2067e") == "a\ufffdb\ufffdc\ufffdd\ufffde"
