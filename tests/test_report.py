"""The report: what stands on the page is right, harmless whatever files are called, and opens in a browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import tclip
import tclip_report
from tclip_report import write_report

NASTY = [
    "<script>parent.hacked = 1</script>",
    "\"quoted\" 'twice' & <b>bold</b>",
    '"><img src=x onerror="parent.hacked = 1">',
    "תנין \u202egnp.exe",
    "one\nline\0or\ttwo",
    "nospaces" * 60,
    "a very long name of many words " * 20,
    "undecodable \udcff",
]
HISTORY = [
    dict(epoch=e, loss=9.5 - e, cross_entropy=2.5 / e, c3l=7 - e, lr=0.1, labels_changed=0.05 * e, seconds=1.0)
    for e in range(1, 6)
]


class Pixels:
    """Pixels as in a file: they can be indexed with a tensor, and that is all; it is noted what was fetched."""

    def __init__(self, pixels):
        self.pixels, self.fetched = pixels, []

    def __getitem__(self, index):
        self.fetched += index.tolist()
        return self.pixels[index]


def a_run(classes=4, count=300, size=8, truth=True, names=None, image_names=None, seed=0):
    """Arguments of write_report() but path: a teacher that is often wrong, a student that is less so."""
    draw = torch.Generator().manual_seed(seed)
    right = torch.randint(classes, (count,), generator=draw)

    def table(strength):
        shift = strength * torch.nn.functional.one_hot(right, classes)
        return (shift + 1.5 * torch.randn(count, classes, generator=draw)).softmax(1)

    pixels = torch.randint(256, (count, 3, size, size), generator=draw, dtype=torch.uint8)
    images = tclip.Images(
        Pixels(pixels),
        image_names or [f"{i:05d}" for i in range(count)],
        names or [f"class {c}" for c in range(classes)],
        right if truth else None,
    )
    summary = dict(dataset="digits", clip="offline", seconds=61.2, device="cpu", torch="2.9")
    summary |= dict(teacher_inductive_accuracy=0.5, inductive_accuracy=0.75 if truth else None)
    config = tclip.complete(tclip.Config(out="unused"))
    return dict(
        config=config,
        images=images,
        probs=table(1.5),
        labels=table(3),
        student_probs=table(2.5),
        summary=summary,
        history=HISTORY,
    )


@pytest.fixture
def page_of(tmp_path):
    """page_of(arguments) is the page's HTML."""

    def write(arguments):
        write_report(tmp_path / "report.html", **arguments)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


def section_of(page, title):
    """One section's HTML, from its heading on."""
    (found,) = re.findall(rf"<h2>{title}</h2>.*?</section>", page, re.S)
    return found


def plain(fragment):
    """The text of some HTML, on one line."""
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", fragment)).split())


def tiles_of(page):
    return {plain(name): plain(value) for name, value in re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", page)}


def shown(fragment):
    """Names of the images in a grid, in order."""
    return [html.unescape(alt) for alt in re.findall('alt="(.*?)"', fragment)]


def names_by(probs):
    return probs.numpy().argmax(1)


def numbers_of(fragment):
    """{(row, column): (number, of)} of the cells of one matrix."""
    cells = re.findall(r'title="class (\d+) (?:now )?called class (\d+): (\d+) of (\d+)"', fragment)
    return {(int(r), int(c)): (int(n), int(total)) for r, c, n, total in cells}


def counted(rows, columns):
    """The same, counted one by one."""
    cells = {}
    for pair in zip(rows.tolist(), columns.tolist()):
        cells[pair] = cells.get(pair, 0) + 1
    return {pair: (number, int((rows == pair[0]).sum())) for pair, number in cells.items()}


# The numbers


def test_headline(page_of):
    """Accuracies, worst class, changed labels and confidence are those of a count by hand."""
    run = a_run()
    page, truth = page_of(run), run["images"].truth.numpy()
    before, after = (names_by(run[key]) == truth for key in ("probs", "student_probs"))
    assert plain(re.findall("<h1>.*</h1>", page)[0]) == (
        f"Teacher {before.mean():.1%} → student {after.mean():.1%} right".replace("%", " %")
    )
    fewer = 1 - (~after).sum() / (~before).sum()
    assert f"on the 300 unlabeled images. The student makes {100 * fewer:.0f}\xa0% fewer mistakes" in page
    worst = [min((ok[truth == c].mean(), c) for c in range(4)) for ok in (before, after)]
    changed = (names_by(run["labels"]) != names_by(run["probs"])).mean()
    assert tiles_of(page) == {
        "held-out images": "50.0 % → 75.0 %",
        "worst class": " → ".join(f"{100 * share:.1f} % class {c}" for share, c in worst),
        "labels changed": f"{100 * changed:.1f} %",
        "student’s mean confidence": f"{100 * run['student_probs'].numpy().max(1).mean():.1f} %",
    }
    facts = plain(re.findall("<p class=facts>.*</p>", page)[0])
    assert facts == "digits · 300 images · 4 classes · teacher offline · 61 s on cpu"


def test_headline_without_truth(page_of):
    """Agreement instead of accuracy, and what that does not mean. Truth that is nowhere known is no truth."""
    run = a_run(truth=False)
    page = page_of(run)
    agreed = (names_by(run["student_probs"]) == names_by(run["probs"])).mean()
    assert f"agree on <b>{100 * agreed:.1f}\xa0%</b> of 300 images" in page
    assert "Agreement is not accuracy" in page and "right" not in tiles_of(page) and "✓" not in page
    assert "worst class" not in tiles_of(page) and "named right" not in page
    run["images"].truth = torch.full((300,), -1)
    assert page_of(run) == page


def test_partly_known_truth(page_of):
    """Accuracies count the images of known class only, and the page says how many these are."""
    run = a_run()
    run["images"].truth[:200] = -1
    page, truth = page_of(run), run["images"].truth.numpy()
    right = (names_by(run["student_probs"]) == truth)[200:].mean()
    assert f"student <b class=student>{100 * right:.1f}\xa0%</b>" in page
    assert "300 unlabeled images, of which the true class of 100 is known" in page
    assert "with a mark" not in page and '<i style="left' not in page  # true shares are not known


@pytest.mark.parametrize("truth", [True, False])
def test_matrices(page_of, truth):
    """Every cell of the matrices is a count by hand, and the numbers drawn are their shares in %."""
    run = a_run(truth=truth)
    title = "The noise, before and after" if truth else "What the teacher called x is now called y"
    found = re.findall("<table.*?</table>", section_of(page_of(run), title), re.S)
    teacher, student = names_by(run["probs"]), names_by(run["student_probs"])
    expected = [(run["images"].truth.numpy(), names) for names in (teacher, student)] if truth else [(teacher, student)]
    assert [numbers_of(table) for table in found] == [counted(*pair) for pair in expected]
    for table, pair in zip(found, expected):
        drawn = sorted(int(n) for n in re.findall(r">(\d+)</td>", table))
        assert drawn == sorted(round(100 * n / total) for n, total in counted(*pair).values())
        kinds = re.findall(r'<td class="(right|wrong)[^>]*title="class (\d+) (?:now )?called class (\d+):', table)
        assert kinds and all((kind == "right") == (r == c) for kind, r, c in kinds)
        assert all(f"--v:{n / total:.2f}" in table for n, total in counted(*pair).values())


def test_many_classes(page_of):
    """Beyond thirty classes the most frequent confusions are listed; between, a matrix without numbers is drawn."""
    run = a_run(classes=40, count=2000)
    section = section_of(page_of(run), "The noise, before and after")
    assert "<table" not in section
    for key, listed in zip(("probs", "student_probs"), re.findall("<ol>.*?</ol>", section)):
        cells = counted(run["images"].truth.numpy(), names_by(run[key]))
        numbers = sorted((n for (r, c), (n, _) in cells.items() if r != c), reverse=True)
        items = re.findall(r"<bdi>class (\d+)</bdi> called <bdi>class (\d+)</bdi> <em>(\d+) images?, (\d+)", listed)
        assert [int(n) for _, _, n, _ in items] == numbers[:12]
        for r, c, n, share in items:
            assert cells[int(r), int(c)][0] == int(n) and round(100 * int(n) / cells[int(r), int(c)][1]) == int(share)
    section = section_of(page_of(a_run(classes=20)), "The noise, before and after")
    assert len(re.findall("<table", section)) == 2 and not re.search(r">\d+</td>", section)


@pytest.mark.parametrize("truth", [True, False])
def test_class_by_class(page_of, truth):
    """Shares and accuracies of each class, the worst first, each with bars of their length."""
    run = a_run(classes=20, count=600, truth=truth)
    section = section_of(page_of(run), "Class by class")
    teacher, student = names_by(run["probs"]), names_by(run["student_probs"])
    right = run["images"].truth.numpy() if truth else None
    rows, key = {}, {}
    for c in range(20):
        rows[f"class {c}"] = [(teacher == c).mean(), (student == c).mean()]
        key[f"class {c}"] = -abs((teacher == c).mean() - (student == c).mean())
        if truth:
            rows[f"class {c}"] += [(names[right == c] == c).mean() for names in (teacher, student)]
            key[f"class {c}"] = rows[f"class {c}"][3]
    found = re.findall("<tr><th scope=row><bdi>(.*?)</bdi></th>(.*?)</tr>", section)
    found = {name: re.findall(r"width:([\d.]+)%.*?<em>([\d.]+)", cells) for name, cells in found}
    assert list(found) == sorted(rows, key=lambda name: (round(key[name], 9), int(name[6:])))
    true = [(right == c).mean() for c in range(20)] if truth else [0]
    longest = max(true + [share for row in rows.values() for share in row[:2]])
    for name, row in rows.items():
        lengths = [row[0] / longest, row[1] / longest, *row[2:]]
        assert found[name] == [(f"{100 * length:.1f}", f"{100 * share:.1f}") for length, share in zip(lengths, row)]
    if truth:
        marks = [float(mark) for mark in re.findall(r'<i style="left:([\d.]+)%">', section)]
        places = [100 * true[int(name[6:])] / longest for name in found]
        assert marks[::2] == marks[1::2] == pytest.approx(places, abs=0.06)  # one on each of the two bars
    assert "<summary>4 more classes</summary>" in section


def test_curves(page_of):
    """Each line has a point for each epoch, from the left end to the right, at the height of its value."""
    section = section_of(page_of(a_run()), "How the training went")
    lines = [[tuple(map(float, p.split(","))) for p in line.split()] for line in re.findall('points="(.*?)"', section)]
    assert [len(line) for line in lines] == [5] * 4
    for line, key in zip(lines, ("loss", "cross_entropy", "c3l", "labels_changed")):
        values = np.array([row[key] for row in HISTORY])
        x, y = np.array(line).T
        assert np.allclose(x, np.linspace(44, 470, 5), atol=0.06)
        top = 10 if key != "labels_changed" else 0.25  # the round number on top of the scale
        assert np.allclose(y, 194 - 184 * values / top, atol=0.06)
    assert "loss 8.5 → 4.5" in section and "labels changed 5 → 25 %" in section
    assert re.findall(r"end>([\d.]+ ?%?)</text>", section)[-6:] == ["0 %", "5 %", "10 %", "15 %", "20 %", "25 %"]


@pytest.mark.parametrize(
    "highest, top", [(0, 1), (0.003, 0.003), (1, 1), (2.01, 2.5), (8.11, 10), (20.1, 25), (99, 100)]
)
def test_round_steps(highest, top):
    """Scales begin at zero, end at or just above the highest value, and have few steps."""
    steps = tclip_report.round_steps(highest)
    assert steps[0] == 0 and steps[-1] == pytest.approx(top) and 4 <= len(steps) <= 7


# The images


def spread(pairs, most=24, same=8):
    """The first `most` of these (image, kind), with at most `same` of a kind."""
    chosen = []
    for i, kind in pairs:
        if [k for _, k in chosen].count(kind) < same and len(chosen) < most:
            chosen.append((i, kind))
    return [i for i, _ in chosen]


@pytest.mark.parametrize("classes", [2, 4, 12])
def test_grids(page_of, classes):
    """The surest changes and the least sure images, in order, with their names and a mark for right and wrong."""
    run = a_run(classes=classes)
    page, truth = page_of(run), run["images"].truth.numpy()
    teacher, label, labels = names_by(run["probs"]), names_by(run["labels"]), run["labels"].numpy()
    changed = [i for i in range(300) if teacher[i] != label[i]]
    changed.sort(key=lambda i: -labels[i].max())
    changed = spread([(i, (teacher[i], label[i])) for i in changed])
    section = section_of(page, "Surest changes")
    assert shown(section) == [f"{i:05d}" for i in changed] and len(changed) == (16 if classes == 2 else 24)
    for i, caption in zip(changed, re.findall("<figcaption>(.*?)</figcaption>", section)):
        verdict = "✓" if label[i] == truth[i] else f"✗ class {truth[i]}"
        sure = f"{100 * labels[i].max():.0f}"
        assert plain(caption) == f"class {teacher[i]} class {label[i]} {sure} % {verdict}"

    student = run["student_probs"].numpy()
    ordered = np.sort(student, 1)
    least = sorted(range(300), key=lambda i: ordered[i, -1] - ordered[i, -2])[:24]
    section = section_of(page, "Where the student is least sure")
    assert shown(section) == [f"{i:05d}" for i in least]
    for i, caption in zip(least, re.findall("<figcaption>(.*?)</figcaption>", section)):
        first, second = student[i].argsort()[::-1][:2]
        lines = [f"class {c} {100 * student[i, c]:.0f} %" + " ✓" * int(c == truth[i]) for c in (first, second)]
        assert plain(caption) == " ".join(lines + [f"✗ class {truth[i]}"] * (truth[i] not in (first, second)))


def test_only_shown_images_are_fetched(page_of):
    """Pixels may lie in a file: no more of them are read than stand on the page."""
    run = a_run()
    page = page_of(run)
    assert [f"{i:05d}" for i in run["images"].pixels.fetched] == shown(page) and len(shown(page)) == 48


@pytest.mark.parametrize("size, kind", [(8, "png"), (32, "png"), (96, "jpeg"), (400, "jpeg")])
def test_pictures(page_of, size, kind):
    """Small images are in the page to the bit, and enlarged by a whole number; larger ones are small JPEGs."""
    import base64
    import io

    from PIL import Image

    run = a_run(size=size, count=30)
    page = page_of(run)
    for name, (found, data, width) in zip(
        shown(page), re.findall(r'src="data:image/(\w+);base64,(.*?)" width=(\d+)', page), strict=True
    ):
        picture, pixels = Image.open(io.BytesIO(base64.b64decode(data))), run["images"].pixels.pixels[int(name)]
        assert found == kind and picture.size == (min(size, 160),) * 2
        if kind == "png":
            assert (np.asarray(picture) == pixels.permute(1, 2, 0).numpy()).all() and int(width) % size == 0
        elif size <= 160:
            assert abs(np.asarray(picture).mean() - pixels.float().mean().item()) < 3
    assert len(page) < 1_500_000 and ("grid pixels" in page) == (kind == "png")


def test_nothing_changed(page_of):
    """Where no label changed the page says so."""
    run = a_run()
    run["labels"] = run["probs"]
    page = page_of(run)
    assert tiles_of(page)["labels changed"] == "0.0 %"
    assert "No label changed" in section_of(page, "Surest changes") and len(shown(page)) == 24


# What may be missing, and what is told


def test_missing_accuracies(page_of):
    """Accuracies in the summary may be missing; the page shows what can be counted. So may be the history."""
    run = a_run()
    run["summary"], run["history"] = dict(inductive_accuracy=None), []
    page = page_of(run)
    assert list(tiles_of(page)) == ["worst class", "labels changed", "student’s mean confidence"]
    run["history"] = HISTORY[:1]
    run["summary"] = dict(inductive_accuracy=0.25)
    assert tiles_of(page_of(run))["held-out images"] == "25.0 %"


def test_weaker_student(page_of):
    """A student below its teacher, and classes that it never says, are told."""
    run = a_run()
    run["student_probs"] = run["probs"].roll(1, 0)
    run["student_probs"][:, 2] = 0
    page = page_of(run)
    assert "below its teacher" in page and "fewer mistakes" not in page
    assert "The student never says <bdi>class 2</bdi></strong>: 1 of 4 classes" in page


def test_skipped_files_and_settings(page_of):
    """The first fifty of the skipped files with their reasons, and every setting."""
    skipped = [dict(file=f"{i}.jpg", reason=f"broken {i}") for i in range(60)]
    run = a_run()
    page = page_of(run | dict(skipped=skipped))
    found = re.findall(r"<bdi>(\d+\.jpg)</bdi></th><td><bdi>(broken \d+)</bdi>", page)
    assert found == [tuple(row.values()) for row in skipped[:50]]
    assert "and 10 more" in page and "60 files skipped" in page
    assert "skipped" not in page_of(run)
    settings = dict(re.findall("<tr><th scope=row>(.*?)</th><td>(.*?)</td></tr>", page))
    values = tclip.asdict(run["config"]).items()
    assert {k: settings[k] for k, _ in values} == {k: "" if v is None else html.escape(str(v)) for k, v in values}


# Harmless, whole, and good to look at


def nasty_run(**keywords):
    """A run in which everything that comes from outside tries to be something else."""
    names = [NASTY[i % len(NASTY)] + str(i) * (i >= len(NASTY)) for i in range(300)]
    run = a_run(names=NASTY, classes=len(NASTY), image_names=names, **keywords)
    run["config"] = tclip.replace(run["config"], dataset=NASTY[0], clip=NASTY[2], root=NASTY[1], out=NASTY[7])
    run["summary"] |= dict(device=NASTY[2], torch=NASTY[0])
    return run | dict(skipped=[dict(file=name, reason=name) for name in NASTY])


def test_text():
    """Nothing but text comes out of text(): no markup, no quotes, no control characters, on one line, not endless."""
    assert tclip_report.text('<a href="x">\'&amp;\n\n b') == "&lt;a href=&quot;x&quot;&gt;&#x27;&amp;amp; b"
    assert tclip_report.text("a\u202eb\0c\udcffd\u2067e") == "a\ufffdb\ufffdc\ufffdd\ufffde"
    assert len(html.unescape(tclip_report.text("<" * 500))) == 160 and tclip_report.text("x" * 500).endswith("x…")
    assert tclip_report.text("ü ת 猫 😀") == "ü ת 猫 😀"


def test_nasty_names(page_of):
    """The page of nasty names has the same elements as that of plain ones: no name became markup."""

    def elements(run):
        return sorted(
            re.findall(r"</?[a-z]\w*", re.sub(r"<td [^>]*>\d*</td>|<td></td>|<[^>]*--v[^>]*>", "", page_of(run)))
        )

    plain_run = a_run(classes=len(NASTY)) | dict(skipped=[dict(file="a", reason="b")] * len(NASTY))
    assert elements(nasty_run()) == elements(plain_run)
    page = page_of(nasty_run())
    assert "<script" not in page and "onerror=&quot;" in page and "<b>bold" not in page and "\u202e" not in page


def test_written_at_once(tmp_path, monkeypatch):
    """A report that cannot be written to its end leaves the old one as it was."""
    path, run = tmp_path / "report.html", a_run()
    path.write_text("old")

    def full(self, *arguments, **keywords):
        self.write_bytes(b"<!doctype")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(tclip.UserError, match="disk full"):
            write_report(path, **run)
    assert path.read_text() == "old"
    write_report(str(path), **run)  # a plain string will do
    assert path.read_text().startswith("<!doctype html>") and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a browser says of some pages at some widths: {(page, width): facts}, and what it wrote on its console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("neither chromium nor google-chrome is installed")
    folder = tmp_path_factory.mktemp("pages")
    pages = dict(
        usual=a_run(classes=20),
        two=a_run(classes=2, truth=False),
        nasty=nasty_run(),
        nasty_photos=nasty_run(size=96, truth=False),
        many=a_run(classes=200, count=3000),
    )
    frames = []
    for name, run in pages.items():
        write_report(folder / f"{name}.html", **run)
        page = html.escape((folder / f"{name}.html").read_text(encoding="utf-8"))
        # A browser's own window is no narrower than 500 pixels; a frame in it is.
        frames += [f'<iframe id="{name} {w}" style="width:{w}px" srcdoc="{page}"></iframe>' for w in (360, 1200)]
    script = """<script>
      function look(frame) {
        const page = frame.contentDocument, images = [...page.images];
        page.querySelectorAll("details").forEach(details => { details.open = true });
        return { id: frame.id, images: images.length, broken: images.filter(image => !image.naturalWidth).length,
                 overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
                 colours: new Set([...page.querySelectorAll(".matrix td")].map(
                   cell => frame.contentWindow.getComputedStyle(cell).backgroundImage)).size,
                 sections: page.querySelectorAll("h2").length, scripts: page.scripts.length };
      }
      onload = () => {
        const seen = [...document.querySelectorAll("iframe")].map(look);
        document.body.textContent = JSON.stringify({ hacked: window.hacked || 0, seen });
      }
    </script>"""
    (folder / "host.html").write_text(f"<!doctype html><meta charset=utf-8>{''.join(frames)}{script}", "utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--v=0",
        "--hide-scrollbars",
    ]
    flags += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", (folder / "host.html").as_uri()]
    done = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=60)
    result = json.loads(html.unescape(re.search("<body>(.*?)</body>", done.stdout, re.S)[1]))
    return dict(
        hacked=result["hacked"],
        pages={frame.pop("id"): frame for frame in result["seen"]},
        console=[line for line in done.stderr.splitlines() if ":CONSOLE" in line],
    )


def test_browser_opens_it(seen):
    """Every page opens without a word on the console, with all its images, and runs no script."""
    assert seen["console"] == [] and seen["hacked"] == 0 and len(seen["pages"]) == 10
    for name, page in seen["pages"].items():
        assert page["sections"] == 6 and page["broken"] == page["scripts"] == 0 and page["images"] >= 40, (name, page)


def test_cells_are_coloured(seen):
    """The cells of a matrix have the colours that their shares ask for, and the list of confusions has none."""
    colours = {name.split()[0]: page["colours"] for name, page in seen["pages"].items()}
    assert colours.pop("many") == 0 and colours["two"] == 5  # two rows of right and wrong, and the empty corner
    assert colours["usual"] > 20 and min(colours.values()) >= 5


def test_no_page_is_wider_than_its_window(seen):
    """No scrolling to the side, neither on a phone nor on a desk, with all that is folded unfolded."""
    assert {name: page["overflow"] for name, page in seen["pages"].items() if page["overflow"] > 0} == {}


# The picture of the confusion matrices


@pytest.mark.parametrize("classes", [2, 60])
def test_draw_noise(tmp_path, classes):
    """A PNG of both matrices, for few classes and many, names with dollars and unknown accuracies among them."""
    from PIL import Image

    run = a_run(classes=classes)
    truth = run["images"].truth
    names = ["$\\frac$", "a $ b", *(f"a class with a long name, number {c}" for c in range(classes - 2))]
    scores = [tclip.score(run["probs"], truth), tclip.score(run["student_probs"], None)]
    tclip_report.draw_noise(tmp_path / "noise.part", names, *scores)
    picture = Image.open(tmp_path / "noise.part")
    assert picture.format == "PNG" and picture.width > 1.2 * picture.height
