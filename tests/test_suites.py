"""The benchmark's suites, on tiny files laid out as the real ones; its command; and the labels of WHU-RS19."""

import io
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, coloured, rows_of, settings
from PIL import Image

import tclip

sys.path.insert(0, str(ROOT / "tutorials/benchmark"))
import annotator  # noqa: E402
import few_labels  # noqa: E402
import run  # noqa: E402
import suites  # noqa: E402
import unknown  # noqa: E402
import whurs19  # noqa: E402

CIFAR10 = tclip.DATASETS["cifar10"]["classes"]
FOLDERS = sorted(annotator.BENT)


def jpeg(value):
    """The bytes of a gray JPEG file, 32 px."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value,) * 3).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """CIFAR-10 of 30 + 20 images, image i as gray as 4 i, and answers; EuroSAT of 6 images a class, and GPT-4V's."""
    root, rng = tmp_path_factory.mktemp("root"), np.random.default_rng(0)
    truth = "file,label\n" + "".join(f"{i:05d}.jpg,{CIFAR10[i % 10]}\n" for i in range(30))
    files = {f"cifar10/unlabeled/{i:05d}.jpg": jpeg(4 * i) for i in rng.permutation(30)}
    files |= {f"cifar10/test/{CIFAR10[i % 10]}/{i:05d}.jpg": jpeg(4 * i) for i in range(20)}
    with tarfile.open(root / "cifar10.tar.xz", "w:xz") as archive:
        for name, content in (files | {"cifar10/truth.csv": truth.encode()}).items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    order, back = rng.permutation(30), CIFAR10[::-1]  # answers in another order of images and of classes
    votes = np.stack([np.where(np.arange(10) < 7, 9 - i % 10, 9 - (i + 1) % 10) for i in order])  # 7 of 10 are right
    saved = dict(files=np.array([f"{i:05d}.jpg" for i in order]), classes=np.array(back))
    np.savez(root / "cifar10_clip_vitl14_votes.npz", votes=votes.astype(np.uint8), **saved)
    np.savez(root / "cifar10_annotator.npz", probs=np.eye(10, dtype=np.float16)[[9 - i % 10 for i in order]], **saved)
    logits = 50 * np.eye(10, dtype=np.float32)[np.arange(20) % 10]
    saved = dict(files=np.array([f"test/{CIFAR10[i % 10]}/{i:05d}.jpg" for i in range(20)]), classes=np.array(CIFAR10))
    np.savez(root / "cifar10_clip_vitb32_logits.npz", logits=logits, logits_french=logits[::-1], **saved)

    with zipfile.ZipFile(root / "eurosat.zip", "w") as archive:
        for folder in FOLDERS:
            for i in range(6):
                archive.writestr(f"somewhere/2750/{folder}/{folder}_{i}.jpg", jpeg(40 * i))
    ranks = [[folder, FOLDERS[0], FOLDERS[1]] if folder > FOLDERS[1] else ["", "", ""] for folder in FOLDERS]
    rows = [["file", *(f"rank{i}" for i in range(1, 6))]]
    rows += [[f"{f}/{f}_{i}.jpg", *r, "", ""] for i in range(4) for f, r in zip(FOLDERS, ranks)]
    (root / "eurosat_gpt4v.csv").write_text("\n".join(map(",".join, rows)))
    return root


def task(root, name, count=None, **changes):
    config = tclip.Config(root=str(root), **suites.SUITES[name].settings | changes)
    return suites.SUITES[name].load(config, count)


@pytest.mark.parametrize("name, sure", [("cifar10-votes", 0.7), ("cifar10-annotator", 1)])
def test_cifar10_training_images(root, name, sure):
    """Pixels, truth and answers of an image lie together, whatever the order in the files; test images are held out."""
    for count in (None, 12):
        images = (t := task(root, name, count)).unlabeled
        number = torch.tensor([int(n[:5]) for n in images.names])
        assert len(number) == (count or 30) and (number.diff() > 0).all()
        assert (images.pixels.float().mean((1, 2, 3)) - 4 * number).abs().max() < 3
        assert torch.equal(images.truth, number % 10) and torch.equal(images.probs.argmax(1), number % 10)
        torch.testing.assert_close(images.probs.amax(1), torch.full((len(number),), float(sure)))
        assert torch.equal(t.heldout.truth, torch.arange(20) % 10) and t.heldout.probs is None


def test_cifar10_clip(root):
    """The test images are the unlabeled ones, training images held out; French answers are read where asked for."""
    t = task(root, "cifar10-clip")
    assert t.unlabeled.truth.tolist() == t.unlabeled.probs.argmax(1).tolist() == [*range(10)] * 2
    french = task(root, "cifar10-clip-french").unlabeled.probs.argmax(1)
    assert torch.equal(french, 9 - t.unlabeled.truth) and len(t.heldout.names) == 30


def test_eurosat_gpt4v(root, monkeypatch):
    """Images that were named, with ranks as probabilities; a refusal is undecided; the others are held out. The second
    time the archive is not opened."""
    t = task(root, "eurosat-gpt4v")
    monkeypatch.setattr(suites, "members", None)
    assert torch.equal(task(root, "eurosat-gpt4v").heldout.pixels, t.heldout.pixels)
    assert len(t.unlabeled.names) == 40 and len({*t.unlabeled.names, *t.heldout.names}) == 60
    for name, truth, probs in zip(t.unlabeled.names, t.unlabeled.truth, t.unlabeled.probs):
        folder, expected = name.split("/")[0], [0.1] * 10
        if folder > FOLDERS[1]:  # ranked: its own folder, the first and the second; 0.1 is left for all
            expected = [0.01] * 10
            for weight, said in zip((0.6, 0.2, 0.1), (folder, *FOLDERS[:2])):
                expected[FOLDERS.index(said)] += weight
        assert FOLDERS[truth] == folder
        torch.testing.assert_close(probs, torch.tensor(expected))


def test_long_tailed():
    """The largest class keeps all, the smallest one in ten, the ratio of two neighbours is the same; seeds differ."""
    truth = torch.arange(10).repeat(1000)
    kept = [suites.long_tailed(truth, 10, seed) for seed in (1, 1, 2)]
    sizes = truth[kept[0].unique()].bincount().sort(descending=True).values.tolist()
    assert sizes == [round(1000 * 10 ** (-i / 9)) for i in range(10)]
    assert torch.equal(*kept[:2]) and truth[kept[0]].bincount().tolist() != truth[kept[2]].bincount().tolist()


def test_digits(monkeypatch):
    """Digits have CLIP's answers and features; with classes 10 : 1 each seed has other images, and both keep step."""
    read = tclip.read_dataset(tclip.Config(dataset="digits", **suites.WRITING))
    monkeypatch.setattr(tclip, "read_dataset", lambda config: read)  # once: it takes seconds
    t, whole = task("", "digits", 50), read[0]
    assert len(t.unlabeled.names) == 50 and t.heldout.probs is not None
    drawn = [task("", "digits-10to1", seed=seed) for seed in (0, 1)]
    assert drawn[0].unlabeled.names != drawn[1].unlabeled.names  # and yet all seeds count together:
    assert len({run.settings_of(settings(), t) for t in drawn}) == 1
    for images in (t.unlabeled, drawn[0].unlabeled):
        rows = torch.tensor([whole.names.index(name) for name in images.names])
        for field in ("pixels", "truth", "probs", "features"):
            assert torch.equal(getattr(images, field), getattr(whole, field)[rows])


def test_added_data_sets(monkeypatch):
    """MNIST's margin of 4 pixels is cut off, for the student and for CLIP; a fifth of EuroSAT's classes is held out."""
    inside, framed = Image.new("L", (20, 20), 0), Image.new("L", (28, 28), 255)
    framed.paste(inside, (4, 4))
    mnist, eurosat = (lambda root, train, download: [(framed, 3 + train)] * 5), MagicMock()
    eurosat.targets, eurosat.__len__.return_value = [i % 10 for i in range(100)], 100
    monkeypatch.setattr(suites.torchvision.datasets, "MNIST", mnist)
    monkeypatch.setattr(suites.torchvision.datasets, "EuroSAT", lambda root, download: eurosat)
    t, clip = task("", "mnist", 2, cache="none"), tclip.Clip("offline")
    assert t.unlabeled.truth.tolist() == [4, 4] and t.heldout.truth.tolist() == [3] * 5
    assert not t.unlabeled.pixels.any() and t.heldout.pixels.shape == (5, 3, 16, 16)
    torch.testing.assert_close(t.unlabeled.features[:1], clip.encode_images(clip.prepare(inside)[None]))
    kept, heldout = (suites.eurosat_images("", train).indices for train in (True, False))
    assert sorted(kept + heldout) == list(range(100)) and sorted(i % 10 for i in heldout) == sorted([*range(10)] * 2)


def test_annotator(tmp_path):
    """It learns from no unlabeled or held-out image, is as sure as it is right, and is trained once; prototypes
    are bent towards others by their share."""
    images = tclip.Images([str(i) for i in range(400)], coloured(400)[0], truth := torch.arange(400) % 10)
    unlabeled, heldout, probs = annotator.simulated_annotator(images, FOLDERS, tmp_path, labeled=200, epochs=2)
    assert len(unlabeled) == 120 and len(heldout) == 80 and not set(unlabeled.tolist()) & set(heldout.tolist())
    again = annotator.simulated_annotator(images, FOLDERS, tmp_path, labeled=200, epochs=-1)  # would fail if trained
    assert torch.equal(again[2], probs)
    scores = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)) + F.one_hot(truth, 10)
    confidence = (scores / annotator.calibrated_temperature(scores, truth)).softmax(1).amax(1).mean().item()
    assert confidence == pytest.approx((scores.argmax(1) == truth).float().mean().item(), abs=1e-3)
    bent, crop, pasture = annotator.bend(torch.eye(10), FOLDERS), FOLDERS.index("AnnualCrop"), FOLDERS.index("Pasture")
    assert bent[crop, crop] == bent[crop, pasture] > 0 and bent[crop].norm().item() == pytest.approx(1)


@pytest.fixture
def tiny_suite(monkeypatch):
    """A suite of tiny images in place of the digits."""
    pixels, probs, features = coloured(30)
    truth = torch.arange(30) % 3

    def load(config, count):
        unlabeled = tclip.Images([str(i) for i in range(20)], pixels[:20], truth[:20], probs[:20], features[:20])
        heldout = tclip.Images([str(i) for i in range(10)], pixels[20:], truth[20:])
        return suites.Task("somebody", list("abc"), suites.take(unlabeled, torch.arange(count or 20)), heldout)

    tiny = {name: getattr(settings(), name) for name in ("size", "arch", "views", "batch_size", "device")}
    monkeypatch.setitem(suites.SUITES, "digits", suites.Suite(load, tiny))


def command(folder, *options):
    run.main(["--suite", "digits", "--results", str(folder), "--epochs", "1", *options])


def test_command(tiny_suite, tmp_path, capsys, monkeypatch):
    """A row a run, seeds the outer loop; a table and a picture; and what is there is not done again."""
    command(tmp_path, "--methods", "tclip,GCE", "--seeds", "2")
    rows = rows_of(path := tmp_path / "digits-1-epochs.csv")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in "01" for m in ("tclip", "GCE")]
    out = capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "| teacher: somebody |" in out and out.index("| GCE |") < out.index("| tclip |")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")  # as if it was stopped before the last
    done, one_run = [], run.one_run
    monkeypatch.setattr(run, "one_run", lambda *a: done.append((a[1], a[2].seed)) or one_run(*a))
    command(tmp_path, "--methods", "tclip,GCE", "--seeds", "2")
    assert done == [("GCE", 1)] and len(rows_of(path)) == 4
    monkeypatch.setitem(run.SUITES["digits"].settings, "batch_size", 8)
    command(tmp_path, "--methods", "GCE", "--seeds", "1")  # other settings: the row of before does not count
    assert done == [("GCE", 1), ("GCE", 0)] and "| tclip |" not in capsys.readouterr().out.split("somebody")[-1]


def test_class_prior(tiny_suite, tmp_path, monkeypatch):
    """Where it is asked for a method is told how many images each class has; such rows have a file of their own."""
    told, train = [], tclip.train
    monkeypatch.setattr(tclip, "train", lambda config, *rest: told.append(config.class_prior) or train(config, *rest))
    for prior in ("right", "none"):
        command(tmp_path, "--methods", "tclip", "--seeds", "2", "--class-prior", prior)
    assert told == ["7,7,6", "7,7,6", "none", "none"]
    priors = [json.loads(row["settings"])["class_prior"] for row in rows_of(tmp_path / "digits-right-1-epochs.csv")]
    assert priors == ["right", "right"] and (tmp_path / "digits-1-epochs.csv").exists()


def test_all(tiny_suite, tmp_path, capsys, monkeypatch):
    """It does all of the plan, says before how much that is, and a second time finds nothing to do; tables of both."""
    plan = (
        "--suite digits --epochs 1 --methods 'GCE,tclip' --seeds 2",
        "--suite digits --images 9 --epochs 1 --seeds 1",
    )
    monkeypatch.setattr(run, "PLAN", plan)
    monkeypatch.setattr(run, "other_tables", lambda root, results: None)
    monkeypatch.setattr(run, "draw_tutorials", lambda: print("drawn"))
    monkeypatch.setitem(run.SUITES, "digits", replace(run.SUITES["digits"], methods=("cross-entropy", "tclip")))
    command(tmp_path, "--methods", "tclip", "--seeds", "1")
    path = tmp_path / "digits-1-epochs.csv"
    row = rows_of(path)[0]
    tclip.write_csv(path, [row | dict(seconds=7200)])
    capsys.readouterr()
    run.main(["--all", "--results", str(tmp_path)])
    out = capsys.readouterr().out
    assert f"{plan[0]}: 3 runs to do, 6.0 hours\n{plan[1]}: 2 runs to do, 0.0 hours\nin all 6.0 hours" in out
    assert "without 2 runs" in out and out.index("in all") < out.index("| GCE |") and out.endswith("drawn\n")
    text = (tmp_path / "tables.md").read_text()
    assert "\n| digits-1-epochs | somebody | " in text and text.count("\n| GCE |") == 1
    assert text.count("\n## digits-") == 2 and text.count("\n| cross-entropy |") == 1
    tclip.write_csv(path, [row | dict(unlabeled=1, digest="of other settings"), *rows_of(path)])  # does not count
    run.main(["--all", "--results", str(tmp_path)])
    assert capsys.readouterr().out.count(": 0 runs to do, 0.0 hours") == 2 and len(rows_of(path)) == 5
    assert (tmp_path / "tables.md").read_text() == text


def test_row(tiny_suite):
    """The figures of a row are those of the student, the labels and the teacher, counted by hand."""
    config, images = settings(epochs=1), (t := run.load("digits", settings(), None)).unlabeled
    row, (student, labels) = run.one_run("digits", "tclip", config, t), run.ALL_METHODS["tclip"].run(config, images)
    said = dict(unlabeled=tclip.predict(student, images.pixels), labels=labels, teacher_unlabeled=images.probs)
    right = {name: (probs.argmax(1) == images.truth).float() for name, probs in said.items()}
    right["heldout"] = (tclip.predict(student, t.heldout.pixels).argmax(1) == t.heldout.truth).float()
    assert {name: row[name] for name in right} == pytest.approx({name: x.mean().item() for name, x in right.items()})
    assert row["expected"] == run.outlook.expected_accuracy(images.probs, labels, said["unlabeled"])
    assert row["worst_class"] == pytest.approx(min(right["unlabeled"][images.truth == c].mean() for c in range(3)))
    ceiling = run.load("digits", settings(), 7, "truth").unlabeled
    assert row["teacher_heldout"] == "" and run.accuracy(ceiling.probs, ceiling.truth) == 1 and len(ceiling.names) == 7


def test_table():
    """Mean and sample standard deviation over the seeds, by hand; the teacher once."""
    row = dict(suite="s", method="m", teacher="t", seconds=2, worst_class=0, labels="", teacher_unlabeled=0.5)
    rows = [row | dict(seed=i, unlabeled=u, heldout=0.25) for i, u in enumerate((0.5, 0.6, 0.7))]
    lines = run.table(run.summarise(rows)).splitlines()
    assert lines[2:] == ["| teacher: t | 50.0 |  |  |  |  |  |", "| m | 60.0 ± 10.0 | 25.0 | 0.0 |  | 2 | 3 |"]


def test_expectations(tiny_suite, tmp_path, capsys):
    """Estimates against what came true, by hand; also beside rows of an older version, which have none."""
    with pytest.raises(tclip.UserError, match="no results"):
        command(tmp_path, "--expected")
    command(tmp_path, "--methods", "tclip", "--seeds", "1")
    row = rows_of(path := tmp_path / "digits-1-epochs.csv")[0]
    tclip.write_csv(path, [{name: value for name, value in row.items() if name != "expected"}])
    command(tmp_path, "--methods", "tclip", "--seeds", "2")
    assert [bool(row["expected"]) for row in rows_of(path)] == [False, True]
    tclip.write_csv(path, [row | dict(expected=expected, unlabeled=0.6) for expected in (0.5, 0.9)])
    tclip.write_csv(tmp_path / "other.csv", [dict(suite="whurs19", labels=1)])
    capsys.readouterr()
    command(tmp_path, "--expected")
    *_, line, _, last = capsys.readouterr().out.splitlines()
    assert line == "| digits-1-epochs, tclip | 70.0 | 60.0 | 20.0 | 2 |"
    assert last == "tclip: 20.0 points off in the mean of 1 files, 30.0 at worst."


@pytest.mark.parametrize("options", ["--methods nonsense", "--seeds 0", "--images 0", "--epochs -1"])
def test_mistakes(options, tmp_path):
    """What is wrong is told before anything is done; what is missing with the public place where it is."""
    with pytest.raises(tclip.UserError, match=options.split()[0]):
        command(tmp_path, *options.split())
    for name in suites.SUITES.keys() - {"digits", "digits-10to1", "mnist", "eurosat-clip"}:
        with pytest.raises(tclip.UserError, match=r"missing: .*(github\.com|zenodo\.org)"):
            task(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_trans_clip():
    """Two rounds in loops: labels, means, variance in turn, with neighbours both ways."""
    _, probs, x = coloured(n := 20)
    affinity = torch.zeros(n, n)
    for i in range(n):
        for j in sorted((j for j in range(n) if j != i), key=lambda j: -float(x[i] @ x[j]))[:3]:
            affinity[i, j] += x[i] @ x[j] / 6
            affinity[j, i] += x[i] @ x[j] / 6
    best = [sorted(range(n), key=lambda i: -float(probs[i, c]))[:8] for c in range(3)]
    mean, z, variance = [F.normalize(sum(x[i] for i in rows), dim=0) for rows in best], probs, torch.full((6,), 1 / 6)
    for _ in range(2):
        fit = torch.stack([torch.stack([-0.5 * ((v - m) ** 2 / variance).sum() for m in mean]) for v in x])
        for _ in range(5):
            z = (probs.log() + fit / 50 + affinity @ z).softmax(1)
        mean = [F.normalize(sum(z[i, c] * x[i] for i in range(n)), dim=0) for c in range(3)]
        variance = sum(z[i, c] * (x[i] - mean[c]) ** 2 for i in range(n) for c in range(3)) / n
    torch.testing.assert_close(whurs19.trans_clip(probs, x, rounds=1), z, rtol=1e-3, atol=1e-5)


def test_whurs19(reference, tmp_path, capsys):
    """On real features tclip's labels beat zero-shot, equal classes or not; balance hurts where they are not. Nothing
    of the study leaves the labels as they are."""
    root = reference("whurs19_openai_clip_features.npz").parent

    def table_of(name, methods, *options):
        run.main(["--suite", "whurs19", "--root", str(root), "--results", str(tmp_path), *options])
        assert len(rows_of(tmp_path / f"{name}.csv")) == len(methods) * 3 * 7  # models; one draw, three of 2 ratios
        _, _, *lines = capsys.readouterr().out.splitlines()
        cells = [map(str.strip, line.split("|")) for line in lines]
        return {name: [float(x) for x in figures] for _, name, *figures, _ in cells}

    of, study = table_of("whurs19", whurs19.METHODS), table_of("whurs19-study", whurs19.STUDY, "--study")
    assert len({tuple(figures) for figures in study.values()}) == len(whurs19.STUDY)
    assert study["tclip's labels"] == of["tclip's labels"]
    assert all(ours > teacher + 2 for ours, teacher in zip(of["tclip's labels"], of["zero-shot"]))
    assert of["EM of Gaussians"][0] > of["zero-shot"][0] + 10 and of["balance"][2] < of["zero-shot"][2]


def test_left_out(root):
    """Two classes are gone from names, unlabeled images and answers, whose other columns keep their proportions; their
    held-out images are what is unknown."""
    whole = task(root, "eurosat-gpt4v")
    part, names, others = unknown.left_out(whole, seed=1)
    assert sorted(part.classes + names) == whole.classes and len(names) == 2
    for images, every in ((part.unlabeled, whole.unlabeled), (part.heldout, whole.heldout)):
        assert images.names == [name for name in every.names if name.split("/")[0] not in names]
        assert [part.classes[c] for c in images.truth] == [name.split("/")[0] for name in images.names]
    rows = [whole.unlabeled.names.index(name) for name in part.unlabeled.names]
    probs = whole.unlabeled.probs[rows][:, [whole.classes.index(name) for name in part.classes]]
    torch.testing.assert_close(part.unlabeled.probs, F.normalize(probs, p=1, dim=1), rtol=0, atol=1e-4)
    assert len(others) == sum(name.split("/")[0] in names for name in whole.heldout.names) > 0


@pytest.mark.parametrize("study, rows", [(unknown, 3), (few_labels, 3)], ids=["unknown", "few_labels"])
def test_studies(study, rows, tmp_path, monkeypatch, capsys):
    """One command trains, writes its rows and prints them in a table; given again it prints the same, and trains
    nothing."""
    monkeypatch.setattr(few_labels, "COUNTS", (0, 1))
    monkeypatch.setitem(suites.SUITES, "digits", replace(suites.SUITES["digits"], images=200))
    arguments = ["--suites", "digits", "--seeds", "1", "--epochs", "1", "--results", str(tmp_path)]
    study.main(arguments)
    printed, written = capsys.readouterr().out, rows_of(next(tmp_path.glob("*.csv")))
    assert len(written) == rows and printed.count("\n") >= rows + 2
    if study is unknown:
        assert {row["unknown"]: float(row["familiarity"]) > 0.8 for row in written}["noise"]
    monkeypatch.setattr(tclip, "train", None)
    study.main(arguments)
    assert capsys.readouterr().out == printed


def test_drawn():
    """So many of each class, of each seed others."""
    truth = torch.arange(90) % 9
    rows = few_labels.drawn(truth, 3, seed=0)
    assert truth[rows].bincount().tolist() == [3] * 9 and len(rows.unique()) == 27
    assert set(rows.tolist()) != set(few_labels.drawn(truth, 3, seed=1).tolist())
