"""Training: what it computes, that it reads no truth, that it repeats, goes on after an interruption, and reports."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import coloured, rows_of, settings

import tclip
from tclip import EnsembleLabels, Images, Student, UserError, predict, train


def same(a, b):
    """Whether two results of train() are equal to the bit: students and labels."""
    pairs = [(one.state_dict(), two.state_dict()) for one, two in zip(a, b)]
    return all(one.keys() == two.keys() and all(map(torch.equal, one.values(), two.values())) for one, two in pairs)


def plain_loop(config, pixels, probs, features):
    """The method in a loop of its own: SGD, schedule and batches by hand."""
    torch.manual_seed(config.seed)
    student = Student(config.arch, probs.shape[1], config.size).to(memory_format=torch.channels_last)
    shares = None if config.class_prior == "none" else torch.tensor([0.5, 0.3, 0.2])
    trial = 1 if config.epochs < 8 else config.epochs // 8
    labels = EnsembleLabels(probs, features, config.label_momentum, config.label_neighbours, shares, trial)
    weights, velocity = list(student.parameters()), {}
    steps, done = math.ceil(len(pixels) / config.batch_size), 0
    for epoch in range(config.epochs):
        torch.manual_seed(config.seed + 1_000_003 * (epoch + 1))
        for batch in np.array_split(torch.randperm(len(pixels)).numpy(), steps):
            index = torch.from_numpy(batch)
            views = tclip.augment(pixels[index], views=2, **tclip.VIEWS[config.views])
            with torch.autocast("cpu", torch.bfloat16, enabled=tclip.has_fast_bfloat16(torch.device("cpu"))):
                logits, z = student(views.contiguous(memory_format=torch.channels_last))
            targets, logits = labels.targets(index), logits.float()
            c3l = tclip.class_conditional_contrastive_loss(z, targets, config.temperature, config.class_share)
            loss = F.cross_entropy(logits, torch.cat([targets, targets])) + config.c3l_weight * c3l
            progress = (done + 0.5) / (steps * config.epochs)
            warm, cosine = progress / 0.05, (1 + math.cos(math.pi * progress)) / 2
            lr = config.lr * config.batch_size / 256 * min(warm, cosine)
            for i, g in enumerate(torch.autograd.grad(loss, weights)):
                with torch.no_grad():
                    g = g.add(weights[i], alpha=config.weight_decay)
                    velocity[i] = velocity[i] * 0.9 + g if i in velocity else g
                    weights[i].add_(g.add(velocity[i], alpha=0.9), alpha=-lr)  # Nesterov
            labels.record(torch.cat([index, index]), logits.softmax(1), z)
            done += 1
        labels.end_epoch()
    return student, labels


def test_plain_loop():
    """train() is that loop, to the bit, by usual settings and by others, whose student is another."""
    usual, changes = settings(lr=1.0), dict(class_prior="5,3,2", label_momentum=0.1, weight_decay=0.05, views="photo")
    other = settings(seed=3, c3l_weight=0.3, temperature=0.2, class_share=0.9, **changes)
    results = [train(config, *coloured()) for config in (usual, other)]
    for result, config in zip(results, (usual, other)):
        assert same(result, plain_loop(config, *coloured()))
    assert not same(*results)


def test_truth_is_not_read(tmp_path):
    """By true, shuffled and absent truth a whole run ends with the same student, labels and metrics, to the bit."""
    pixels, probs, features = coloured()
    truth, results = torch.arange(37) % 3, []
    for i, known in enumerate((truth, truth.flip(0), torch.full((37,), -1))):
        images = Images([str(i) for i in range(37)], pixels, known, probs, features)
        summary = tclip.run(settings(out=str(tmp_path / str(i))), lambda _, images=images: (images, images, "rgb"))
        assert (summary["unlabeled_student_accuracy"] is None) == (known.max() < 0)
        rows = rows_of(tmp_path / str(i) / "labels.csv") + rows_of(tmp_path / str(i) / "metrics.csv")
        rows = [{key: value for key, value in row.items() if key not in ("truth", "seconds")} for row in rows]
        results.append((rows, torch.load(tmp_path / str(i) / "model.pt")["student"]))
    for rows, student in results[1:]:
        assert rows == results[0][0] and all(map(torch.equal, student.values(), results[0][1].values()))


def compare_resumed(folder):
    """Resume the run in this folder: it ends as if it had never stopped, with the same metrics. Returns its epochs."""
    epochs, whole = [], folder.with_name("whole")
    whole.mkdir(exist_ok=True)
    expected = train(settings(lr=1.0), *coloured(), whole)
    resumed = train(settings(lr=1.0), *coloured(), folder, on_epoch=lambda row, *_: epochs.append(row["epoch"]))
    metrics = [[row | dict(seconds="") for row in rows_of(run / "metrics.csv")] for run in (whole, folder)]
    assert same(expected, resumed) and metrics[0] == metrics[1] and len(metrics[0]) == 4
    return epochs


@pytest.mark.parametrize("step, again", [(2, [1, 2, 3, 4]), (5, [2, 3, 4]), (10, [4])])  # an epoch has three
def test_interrupted(tmp_path, step, again):
    """Stopped in the middle of an epoch and begun again: that epoch is done again, those before are not. A checkpoint
    of another number of images or classes is no beginning, and is not written over."""
    (run := tmp_path / "run").mkdir()
    ahead = iter(range(1, step))
    with pytest.raises(StopIteration):
        train(settings(lr=1.0), *coloured(), run, lambda *args: next(ahead) and tclip.tclip_objective(*args))
    assert compare_resumed(run) == again
    kept = (run / "checkpoint.pt").read_bytes()
    assert compare_resumed(run) == []  # a finished run comes back without a step
    for other in (coloured(30), coloured(classes=2)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            train(settings(epochs=5), *other, run)
    assert (run / "checkpoint.pt").read_bytes() == kept


def test_full_disk(tmp_path):
    """The error is told, and the checkpoint of before stays whole. (A limit on the size of files stands for it.)"""
    resource = pytest.importorskip("resource")
    (run := tmp_path / "run").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if row["epoch"] == 3 else soft, hard))

    try:
        with pytest.raises((OSError, RuntimeError)):
            train(settings(lr=1.0), *coloured(), run, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert compare_resumed(run) == [3, 4]


def test_loss_not_finite(tmp_path):
    """A run that blows up stops with advice, and keeps no epoch whose loss was not finite."""
    with pytest.raises(UserError, match="--lr"):
        train(settings(lr=1e3, weight_decay=1.0, epochs=40, batch_size=64), *coloured(), tmp_path)
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(tmp_path / "metrics.csv"))


@pytest.mark.parametrize("epochs, trial", [(1, 1), (9, 1), (17, 2), (40, 5)])
def test_trial(epochs, trial):
    """It takes an eighth of the epochs, one at least."""

    def labels(*rule):
        raise KeyError(rule[-1])

    with pytest.raises(KeyError, match=str(trial)):
        train(settings(epochs=epochs), *coloured(), labels=labels)


def test_one_image():
    with pytest.raises(UserError, match="one image is too few"):
        train(settings(), *(table[:1] for table in coloured()))


def test_metrics_and_objective(tmp_path):
    """A row an epoch: on_epoch() gets what metrics.csv says, and what it says of objective and labels is so."""
    rows, losses, used = [], [], [[0, 1.5]]

    def on_epoch(row, student, labels):
        changed = (labels.table.argmax(1) != coloured()[1].argmax(1)).float().mean().item()
        classification, contrastive = torch.stack(losses[-3:]).mean(0).tolist()  # of the three steps of an epoch
        expected = [
            len(rows) + 1,
            changed,
            classification,
            contrastive,
            classification + contrastive,
            *used[-1],
        ]
        used.append(labels.exponents.tolist())  # from now on
        names = ("epoch", "labels_changed", "classification", "contrastive", "loss", "trust", "sharpness")
        assert [row[name] for name in names] == pytest.approx(expected) and row["seconds"] >= 0
        rows.append(row)

    def objective(logits, z, index, labels, config):
        losses.append(torch.stack([logits.square().mean(), 1 + z.mean()]).detach())
        return logits.square().mean(), 1 + z.mean()

    train(settings(label_momentum=0.2), *coloured(), tmp_path, objective, on_epoch)
    assert [{k: float(v) for k, v in row.items()} for row in rows_of(tmp_path / "metrics.csv")] == rows


def test_tclip_objective():
    """Cross-entropy of both views, and lambda times the contrastive loss."""
    logits, z, index = torch.randn(8, 3), F.normalize(torch.randn(8, 5), dim=1), torch.tensor([5, 0, 36, 7])
    labels, config = EnsembleLabels(*coloured()[1:]), settings(c3l_weight=0.3, class_share=0.25)
    targets = labels.targets(index)
    classification, contrastive = tclip.tclip_objective(logits, z, index, labels, config)
    torch.testing.assert_close(classification, -(targets.repeat(2, 1) * logits.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(contrastive, 0.3 * tclip.class_conditional_contrastive_loss(z, targets, 0.5, 0.25))


@pytest.mark.parametrize("n", [2, 3, 17])
def test_any_number_of_images(n):
    """Two images are enough; features are not needed; nothing that is given is written to."""
    pixels, probs, _ = given = coloured(n)
    student, labels = train(settings(epochs=2), pixels, probs)
    assert predict(student, pixels).isfinite().all() and not student.training
    assert labels.table.shape == (n, 3) and labels.table.isfinite().all()
    assert all(torch.equal(*pair) for pair in zip(given, coloured(n)))
