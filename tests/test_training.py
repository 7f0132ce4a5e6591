"""Training: what it reads, that it repeats, that it can be interrupted, and what it reports. All on tiny images."""

import csv
import math
from dataclasses import replace

import pytest
import torch

import tclip
from tclip import Config, EnsembleLabels, Images, UserError, complete, learning_rate, predict, train

N, CLASSES = 37, 3  # N is no multiple of the batch


def tiny(n=N, truth=None):
    """Coloured noise: class c is a little brighter in channel c."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    pixels = torch.randint(0, 160, (n, 3, 8, 8), generator=generator)
    pixels[torch.arange(n), labels] += 80
    return Images(pixels.byte(), [str(i) for i in range(n)], ["red", "green", "blue"], truth)


def opinion(n=N):
    """The teacher's probabilities: mostly right, now and then wrong."""
    logits = torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(n), torch.arange(n) % CLASSES] += 2
    return logits.softmax(1)


def settings(**changes):
    values = dict(size=8, epochs=4, batch_size=16, label_neighbours=3, device="cpu", out="unused")
    return complete(Config(**(values | changes)))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    """Whether two results of train() are equal to the bit."""
    (student, labels), (other, other_labels) = a, b
    pairs = zip(student.state_dict().items(), other.state_dict().items())
    equal = all(name == other_name and torch.equal(x, y) for (name, x), (other_name, y) in pairs)
    return equal and torch.equal(labels.table, other_labels.table)


class Sealed(Images):
    """Images that fail the test when their truth is looked at."""

    @property
    def truth(self):
        raise AssertionError("truth was read")

    @truth.setter
    def truth(self, value):
        pass


def test_truth_is_not_read():
    """The student of true, of shuffled and of absent truth is the same to the bit; nor is truth so much as touched."""
    truth = torch.arange(N) % CLASSES
    result = train(settings(), tiny(truth=truth), opinion())
    for other in (tiny(truth=truth.flip(0)), tiny(), Sealed(**vars(tiny()) | {"truth": None})):
        assert same(result, train(settings(), other, opinion()))


def test_seed():
    """The same seed repeats to the bit, another gives another student; and no earlier draw has a say in it."""
    result = train(settings(seed=3), tiny(), opinion())
    torch.rand(100)
    assert same(result, train(settings(seed=3), tiny(), opinion()))
    assert not same(result, train(settings(seed=4), tiny(), opinion()))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_interrupted(tmp_path, stop):
    """Stopped in any epoch and begun again, a run ends as if it had never stopped: student, labels and metrics."""

    def interrupt(row, student, labels):
        if row["epoch"] == stop:
            raise KeyboardInterrupt

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = train(settings(), tiny(), opinion(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(settings(), tiny(), opinion(), tmp_path / "resumed", interrupt)
    epochs = []
    resumed = train(settings(), tiny(), opinion(), tmp_path / "resumed", lambda row, *_: epochs.append(row["epoch"]))
    assert epochs == list(range(stop, 5))  # the epoch that was interrupted is done again, those before are not
    assert same(whole, resumed) and same(whole, train(settings(), tiny(), opinion()))
    metrics = [rows_of(tmp_path / name / "metrics.csv") for name in ("whole", "resumed")]
    for row in sum(metrics, []):
        row.pop("seconds")
    assert metrics[0] == metrics[1] and len(metrics[0]) == 4


def test_finished_run(tmp_path):
    """A run that is complete comes back from its checkpoint without a step of training."""
    finished = train(settings(), tiny(), opinion(), tmp_path)
    again = train(settings(), tiny(), opinion(), tmp_path, lambda *_: pytest.fail("trained again"))
    assert same(finished, again)


def test_checkpoint_of_another_student(tmp_path):
    """A checkpoint that does not fit is a UserError that names it, and so is one that is cut off."""
    train(settings(epochs=1), tiny(), opinion(), tmp_path)
    with pytest.raises(UserError, match="checkpoint.pt"):
        train(settings(epochs=1, arch="resnet18"), tiny(), opinion(), tmp_path)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="checkpoint.pt"):
        train(settings(epochs=1), tiny(), opinion(), tmp_path)


@pytest.mark.parametrize("batch_size", [16, 64])  # at 64 an epoch is one step: the second is not finite as a whole
def test_loss_not_finite(batch_size, tmp_path):
    """A run that blows up stops with advice, and keeps no epoch whose loss was not finite."""
    with pytest.raises(UserError, match="--lr"):
        train(settings(lr=1e30, batch_size=batch_size), tiny(), opinion(), tmp_path)
    kept = rows_of(tmp_path / "metrics.csv") if batch_size == 64 else []
    assert len(kept) == len(list(tmp_path.iterdir())) // 2 and all(math.isfinite(float(row["loss"])) for row in kept)


def test_metrics(tmp_path):
    """A row an epoch: on_epoch() gets what metrics.csv says, and what it says is so."""
    config, rows, changed = settings(c3l_weight=0.5, epochs=3, label_momentum=0.2), [], []

    def on_epoch(row, student, labels):
        rows.append(row)
        assert isinstance(student, tclip.Student) and isinstance(labels, EnsembleLabels)
        changed.append((labels.table.argmax(1) != opinion().argmax(1)).float().mean().item())

    train(config, tiny(), opinion(), tmp_path, on_epoch)
    written = rows_of(tmp_path / "metrics.csv")
    assert [list(row) for row in written] == [list(row) for row in rows]
    assert [{k: float(v) for k, v in row.items()} for row in written] == rows
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["labels_changed"] for row in rows] == pytest.approx(changed)
    for row in rows:
        assert row["loss"] == pytest.approx(row["cross_entropy"] + 0.5 * row["c3l"])
        assert row["lr"] == learning_rate(config, row["epoch"] / 3)
        assert row["cross_entropy"] > 0 and row["c3l"] > 0 and row["seconds"] >= 0


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17])
def test_any_number_of_images(n):
    """One image is enough, and a last image over does no harm."""
    student, labels = train(settings(epochs=2), tiny(n), opinion(n))
    assert predict(student, tiny(n).pixels).isfinite().all()
    assert labels.table.shape == (n, CLASSES) and labels.table.isfinite().all()


def test_two_views_of_each_image(monkeypatch):
    """In every epoch each image is seen in exactly two views, which differ, and no batch is larger than asked for."""
    visits, both, augment = [], [], tclip.augment

    def record(self, index, *args):
        visits.append(index)

    def spy(pixels, **ranges):
        both.append(augment(pixels, **ranges))
        return both[-1]

    monkeypatch.setattr(EnsembleLabels, "record", record)
    monkeypatch.setattr(EnsembleLabels, "end_epoch", lambda *_, **__: None)
    monkeypatch.setattr(tclip, "augment", spy)
    train(settings(epochs=2), tiny(), opinion())
    for epoch in torch.cat(visits).chunk(2):
        assert torch.bincount(epoch).tolist() == [2] * N
    assert max(map(len, visits)) <= 2 * 16
    for views in both:
        first, second = views.chunk(2)
        assert ((first - second).abs().amax((1, 2, 3)) > 0.01).all()


def test_predictions_are_recorded_for_their_image(monkeypatch):
    """With views that are the images, and a student that answers with an image's mean colour, each image is recorded
    with the answer to itself."""

    class Colour(torch.nn.Module):
        def __init__(self, arch, num_classes, size):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            colour = x.mean((2, 3)) * self.one
            return 20 * colour, torch.nn.functional.normalize(colour, dim=1)

    recorded, images = [], tiny()
    monkeypatch.setattr(tclip, "Student", Colour)
    monkeypatch.setattr(tclip, "augment", lambda pixels, views, **_: (pixels / 255).repeat(views, 1, 1, 1))
    monkeypatch.setattr(EnsembleLabels, "record", lambda self, *values: recorded.append(values))
    monkeypatch.setattr(EnsembleLabels, "end_epoch", lambda *_, **__: None)
    train(settings(lr=0.0, epochs=1), images, opinion())
    for index, probs, z in recorded:
        colour = images.pixels[index].float().mean((2, 3)) / 255
        torch.testing.assert_close(probs, (20 * colour).softmax(1), rtol=0, atol=0.02)
        torch.testing.assert_close(z.float(), colour / colour.norm(dim=1, keepdim=True), rtol=0, atol=0.02)


@pytest.mark.parametrize("prior", ["uniform", "none"])
def test_labels_begin_as_the_teachers(prior):
    """Labels begin as the teacher's, balanced or not, and move with every epoch as the momentum lets them."""
    tables, begin = [], tclip.balance(opinion()) if prior == "uniform" else opinion()
    config = settings(class_prior=prior, label_momentum=0.75)
    train(config, tiny(), opinion(), on_epoch=lambda row, student, labels: tables.append(labels.table.clone()))
    assert 0 < (tables[0] - begin).abs().max() <= 0.25
    assert not torch.equal(tables[1], tables[0]) and not torch.equal(tables[3], tables[2])
    train(replace(config, label_momentum=1.0), tiny(), opinion(), on_epoch=lambda *a: tables.append(a[2].table.clone()))
    assert torch.equal(tables[-1], begin.half())


def test_weight_of_the_contrastive_loss():
    """The contrastive loss is what trains the projector: without its weight only the decay moves that."""
    config = settings(weight_decay=0.0)
    torch.manual_seed(config.seed)
    begin = tclip.Student(config.arch, CLASSES, config.size).projector[0].weight
    for weight, moves in ((0.0, False), (1.0, True)):
        student, _ = train(replace(config, c3l_weight=weight), tiny(), opinion())
        assert torch.equal(student.projector[0].weight, begin) != moves


@pytest.mark.parametrize("positives", ["both", "class", "instance"])
@pytest.mark.parametrize("momentum", [0.5, 1.0])
def test_what_is_pulled_together(monkeypatch, positives, momentum):
    """By class, by instance, or by both: by instance as far as the student of the epoch before is trusted, that is not
    at all where labels are fixed."""
    shares, trust, loss = [], [0.0], tclip.class_conditional_contrastive_loss

    def spy(z, targets, temperature, class_share, negatives):
        shares.append(class_share)
        return loss(z, targets, temperature, class_share, negatives)

    monkeypatch.setattr(tclip, "class_conditional_contrastive_loss", spy)
    config = settings(epochs=3, positives=positives, label_momentum=momentum)
    train(config, tiny(), opinion(), on_epoch=lambda row, student, labels: trust.append(row["trust"]))
    expected = {"both": [1 - w for w in trust], "class": [1.0] * 4, "instance": [0.0] * 4}[positives]
    steps = len(shares) // 3
    assert shares == [share for share in expected[:3] for _ in range(steps)]
    assert (trust[2] > 0) == (momentum < 1)


def test_it_learns():
    """On colours that are easily told apart, the student is right far more often than its teacher."""
    truth, images = torch.arange(300) % CLASSES, tiny(300)
    wrong = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:100]
    said = truth.clone()
    said[wrong] = (truth[wrong] + 1) % CLASSES
    probs = torch.nn.functional.one_hot(said, CLASSES) * 0.8 + 0.2 / CLASSES
    student, _ = train(settings(epochs=5, lr=0.5, views="photo"), images, probs)
    assert (predict(student, images.pixels).argmax(1) == truth).float().mean() > 0.9  # the teacher: 2/3


def test_learning_rate():
    """From zero up in a straight line, to the peak scaled by the batch, and down to zero along a cosine."""
    config = settings(lr=0.3, batch_size=64)
    peak = 0.3 * 64 / 256
    assert learning_rate(config, 0) == 0 and learning_rate(config, 1) == pytest.approx(0, abs=1e-12)
    rates = [learning_rate(config, i / 1000) for i in range(1001)]
    assert 0.98 * peak < max(rates) <= peak and 0.03 < rates.index(max(rates)) / 1000 < 0.07
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[20] == pytest.approx(2 * rates[10])
    assert rates[500] == pytest.approx(peak / 2) and rates[750] == pytest.approx(peak * (1 - math.sqrt(0.5)) / 2)


def test_input_stays():
    """Neither the images nor the teacher's probabilities are written to."""
    images, probs = tiny(), opinion()
    pixels, kept = images.pixels.clone(), probs.clone()
    train(settings(), images, probs)
    assert torch.equal(images.pixels, pixels) and torch.equal(probs, kept)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_accelerator(kind):
    """Training on a GPU, where there is one."""
    try:
        tclip.pick_device(kind)
    except UserError:
        pytest.skip(f"there is no {kind} device")
    student, labels = train(settings(device=kind, epochs=2), tiny(), opinion())
    assert predict(student, tiny().pixels).isfinite().all() and labels.table.device.type == kind
    torch.testing.assert_close(labels.table.float().sum(1).cpu(), torch.ones(N), rtol=0, atol=1e-3)
