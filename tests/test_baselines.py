"""The baselines, against plain implementations of what is published."""

import inspect
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, coloured, settings

import tclip

sys.path.insert(0, str(ROOT / "tutorials/benchmark"))
import baselines  # noqa: E402
from baselines import METHODS, STARTED, STUDY  # noqa: E402

N, CLASSES = 37, 3
PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1]])
LABELS = [0, 2, 1, 0, 1]
INDEX = torch.tensor([4, 1, 2])  # a batch of three images: rows 0..2 are their first views, 3..5 their second
ROWS = [LABELS[i] for i in INDEX.tolist()] * 2


class Sealed:
    """A truth that fails the test when it is looked at."""

    def __getattr__(self, name):
        raise AssertionError("truth was read")


def images():
    """Tiny Images with answers and features, and no truth."""
    pixels, probs, features = coloured(N, CLASSES)
    return tclip.Images([str(i) for i in range(N)], pixels, Sealed(), probs, features)


def random_logits(rows, seed=0):
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)).mul(2)


def softmax(row):
    """In double precision, of a list."""
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


def fixed_labels(targets=baselines.hard):
    return tclip.EnsembleLabels(targets(PROBS), momentum=1.0)


def test_targets():
    """What the methods make of the teacher's probabilities; smoothing is PyTorch's own."""
    assert torch.equal(baselines.soft(PROBS), PROBS)
    assert baselines.hard(PROBS).tolist() == [[float(k == label) for k in range(3)] for label in LABELS]
    logits = random_logits(5)
    expected = F.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, baselines.smoothed(PROBS)), expected)


def test_balanced():
    """Equal class masses; rows on the simplex; the odds of two classes change by one factor for all images."""
    probs = (3 * random_logits(200) + torch.tensor([3.0, 0.0, -3.0])).softmax(1)
    q = baselines.balanced(probs)
    torch.testing.assert_close(q.mean(0), torch.full((3,), 1 / 3), rtol=2e-3, atol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(200))
    near = probs.clamp_min(1e-6)
    factors = (q[:, 0] / q[:, 1]).log() - (near[:, 0] / near[:, 1]).log()
    torch.testing.assert_close(factors, factors.mean().expand(200), rtol=1e-3, atol=1e-3)


def test_gce():
    """Mean over the rows of (1 - p_y^q) / q; and a label that is as good as impossible has a finite gradient."""
    logits, one_hot = random_logits(6), F.one_hot(torch.tensor(ROWS), 3).float()
    plain = [(1 - softmax(row)[y] ** 0.7) / 0.7 for row, y in zip(logits.tolist(), ROWS)]
    assert baselines.gce(logits, one_hot).item() == pytest.approx(np.mean(plain), rel=1e-5)
    impossible = torch.tensor([[-200.0, 0.0, 0.0]], requires_grad=True)
    baselines.gce(impossible, one_hot.new_tensor([[1, 0, 0]])).backward()
    assert impossible.grad.isfinite().all()


def test_sce():
    """alpha * -sum_k y_k log p_k + beta * -sum_k p_k log y_k, where the log of a zero of y is A."""
    logits, total = random_logits(6), 0.0
    for row, label in zip(logits.tolist(), ROWS):
        for k, p in enumerate(softmax(row)):
            total += 0.1 * -(k == label) * math.log(p) + 2.0 * -p * (0 if k == label else -4)
    one_hot = F.one_hot(torch.tensor(ROWS), 3).float()
    assert baselines.sce(logits, one_hot, beta=2.0).item() == pytest.approx(total / 6, rel=1e-5)


def test_elr():
    """CE + lambda * log(1 - <p, t>), and t <- beta t + (1 - beta) p from zero, over three visits of some images."""
    loss, t = baselines.ELR(beta=0.7, weight=3.0), [[0.0] * 3 for _ in PROBS]
    for visit, batch in enumerate(([4, 1, 2], [0, 4, 3], [4, 2, 1])):
        logits = random_logits(6, seed=visit).requires_grad_()
        p = [softmax(row) for row in logits.tolist()]
        total = 0.0
        for row, i in enumerate(batch):  # its target first, which both views then meet
            t[i] = [0.7 * old + 0.3 * (a + b) / 2 for old, a, b in zip(t[i], p[row], p[row + 3])]
        for row, i in enumerate(batch * 2):
            total += 3.0 * math.log(1 - sum(a * b for a, b in zip(p[row], t[i]))) - math.log(p[row][LABELS[i]])
        value = sum(loss(logits, None, torch.tensor(batch), fixed_labels(), None))
        assert value.item() == pytest.approx(total / 6, rel=1e-3)  # the clamp is 1e-4
        torch.testing.assert_close(loss.table, torch.tensor(t), rtol=0, atol=1e-3)
        value.backward()
    assert not loss.table.requires_grad
    certain = torch.tensor([[100.0, 0, 0]] * 2, requires_grad=True)  # p is kept off the ends
    sum(baselines.ELR(beta=0.0)(certain, None, torch.tensor([0]), fixed_labels(), None)).backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("name, temperature", [("SimCLR + CE", 0.5), ("SupCon + CE", 0.1)])
def test_contrast(name, temperature):
    """SimCLR's and SupCon's published losses in loops, beside cross-entropy. SimCLR's is what C3L is where no image
    shares a class with another."""
    logits, z = random_logits(6), F.normalize(random_logits(6, seed=1), dim=1)
    cross_entropy, contrastive = METHODS[name].objective()(logits, z, INDEX, fixed_labels(), settings())
    torch.testing.assert_close(cross_entropy, F.cross_entropy(logits, torch.tensor(ROWS)))
    s, total = (z @ z.T / temperature).double(), 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        positives = [j for j in others if ROWS[j] == ROWS[i]] if name[:3] == "Sup" else [(i + 3) % 6]
        for j in positives:
            total -= math.log(s[i, j].exp() / sum(s[i, k].exp() for k in others)) / len(positives)
    assert contrastive.item() == pytest.approx(total / 6, rel=1e-5)
    if name == "SimCLR + CE":
        c3l = tclip.class_conditional_contrastive_loss(z, torch.eye(3), temperature)
        torch.testing.assert_close(contrastive, c3l)


def test_exchange():
    """Each network learns from the images that are easy for the other, on losses made by hand."""
    first = torch.tensor([0.1, 0.2, 3.0, 4.0], requires_grad=True)  # finds images 0 and 1 easy
    second = torch.tensor([5.0, 0.3, 0.4, 6.0], requires_grad=True)  # finds images 1 and 2 easy
    for_first, for_second = baselines.exchange(first, second, 0.5)
    (for_first + for_second).backward()
    assert first.grad.tolist() == [0, 0.5, 0.5, 0] and second.grad.tolist() == [0.5, 0.5, 0, 0]


def test_co_teaching_forgets(monkeypatch):
    """The share forgotten grows in equal steps to the teacher's mean doubt, and losses are means of two views."""
    asked, exchange = [], baselines.exchange

    def spy(first, second, forget):
        asked.append(forget)
        assert len(first) == len(second) <= 16 and not torch.equal(first, second)
        return exchange(first, second, forget)

    monkeypatch.setattr(baselines, "exchange", spy)
    baselines.co_teaching(settings(epochs=4), images(), images().probs, forget_epochs=2)
    doubt = 1 - images().probs.max(1).values.mean().item()
    assert asked[::3] == pytest.approx([0, doubt / 2, doubt, doubt])


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clean_probability():
    """On losses of two heaps the chance to be right tells them apart, whatever the scale, and whichever is larger."""
    generator = torch.Generator().manual_seed(0)
    for right in (30, 170):
        clean = torch.arange(200) < right
        losses = torch.where(clean, 0.2, 2.0) + 0.15 * torch.randn(200, generator=generator)
        for scale in (1, 100, 0.01):
            assert torch.equal(baselines.clean_probability(scale * losses) > 0.5, clean)
    assert baselines.clean_probability(torch.ones(20)).isfinite().all()


def test_mixup():
    """Rows are mixed with others, images and labels alike, and each keeps at least half of itself."""
    torch.manual_seed(0)
    mixed = [baselines.mixup(torch.eye(6), 2 * torch.eye(6), alpha=0.5) for _ in range(50)]
    for inputs, targets in mixed:
        torch.testing.assert_close(targets, 2 * inputs)
        torch.testing.assert_close(inputs.sum(1), torch.ones(6))
        assert inputs.diag().min() >= 0.5 and ((inputs > 0).sum(1) <= 2).all()
    assert torch.stack([inputs.diag().min() for inputs, _ in mixed]).std() > 0.1  # drawn anew each time


def test_semi_supervised_loss():
    """Cross-entropy of the labeled, squared error of the others, the penalty for unequal classes: in loops."""
    logits, targets = random_logits(7), random_logits(7, seed=1).softmax(1)
    p, t = [softmax(row) for row in logits.tolist()], targets.tolist()
    cross_entropy = -sum(t[i][c] * math.log(p[i][c]) for i in range(4) for c in range(3)) / 4
    squared = sum((t[i][c] - p[i][c]) ** 2 for i in range(4, 7) for c in range(3)) / (3 * 3)
    penalty = sum(1 / 3 * math.log((1 / 3) / (sum(row[c] for row in p) / 7)) for c in range(3))
    loss = baselines.semi_supervised_loss(logits, targets, 4, 25.0)
    assert loss.item() == pytest.approx(cross_entropy + 25 * squared + penalty, rel=1e-5)


def test_divided_epoch(monkeypatch):
    """The believed images keep their label by its chance, all targets are sharpened, and the other network stays."""
    config, clean, seen = settings(batch_size=N), torch.linspace(0, 1, N), []
    (student, optimizer), (other, _) = (baselines.new_student(config, images(), CLASSES) for _ in range(2))
    answers = [random_logits(2 * 18), random_logits(2 * 18, 1), random_logits(2 * 18, 2), random_logits(4 * 18, 3)]
    replies = iter(answers)  # the student on believed images, on others; the other network on those; then to learn
    monkeypatch.setattr(baselines, "forward", lambda network, views: next(replies))
    monkeypatch.setattr(baselines, "batches", lambda config, optimizer, members, epoch: iter([members]))
    monkeypatch.setattr(baselines, "mixup", lambda inputs, targets, alpha: (inputs, targets))
    monkeypatch.setattr(baselines, "descend", lambda optimizer, loss: None)
    monkeypatch.setattr(baselines, "semi_supervised_loss", lambda *arguments: seen.append(arguments))
    labels = images().probs.argmax(1)
    baselines.divided_epoch(config, student, optimizer, other, images().pixels, labels, clean, 12, divided_epochs=4)
    ((_, targets, labeled, weight),) = seen
    assert labeled == 36 and weight == pytest.approx(25 * 4 / 16) and student.training and not other.training
    believed, p = (clean > 0.5).nonzero().flatten().tolist(), [a.softmax(1) for a in answers]
    for row, i in enumerate(believed):
        own = (p[0][row] + p[0][row + 18]) / 2
        expected = (clean[i] * F.one_hot(labels[i], CLASSES) + (1 - clean[i]) * own) ** 2
        guess = ((p[1][row] + p[1][row + 18] + p[2][row] + p[2][row + 18]) / 4) ** 2
        for view in (0, 18):
            torch.testing.assert_close(targets[row + view], expected / expected.sum())
            torch.testing.assert_close(targets[36 + row + view], guess / guess.sum())


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_nothing_to_divide(monkeypatch, chance):
    """Where all or none of the labels are believed it is the warm-up: cross-entropy less the predictions' entropy."""
    losses, logits, config = [], random_logits(2 * N), settings(batch_size=N)
    monkeypatch.setattr(baselines, "forward", lambda network, views: logits)
    monkeypatch.setattr(baselines, "descend", lambda optimizer, loss: losses.append(loss.item()))
    network, labels = baselines.new_student(config, images(), CLASSES), torch.zeros(N, dtype=torch.int64)
    baselines.divided_epoch(config, *network, network[0], images().pixels, labels, torch.full((N,), chance), 0, 0)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert losses == pytest.approx([(F.cross_entropy(logits, labels.repeat(2)) - entropy).item()])


def test_division_is_the_others(monkeypatch):
    """After the warm-up each network gets the division by the other's losses, both made before either is trained."""
    made, calls, new_student = [], [], baselines.new_student

    def spy(*arguments):
        made.append(new_student(*arguments))
        return made[-1]

    def label_loss(student, pixels, labels):
        calls.append("loss")
        return torch.full((N,), float([network for network, _ in made].index(student)))

    def divided_epoch(config, student, optimizer, other, pixels, labels, clean, epoch, divided_epochs):
        calls.append((student, other, clean[0].item(), epoch, divided_epochs))

    monkeypatch.setattr(baselines, "new_student", spy)
    monkeypatch.setattr(baselines, "label_loss", label_loss)
    monkeypatch.setattr(baselines, "clean_probability", lambda losses: losses)
    monkeypatch.setattr(baselines, "divided_epoch", divided_epoch)
    both = baselines.divide_mix(settings(epochs=2), images(), images().probs, warm_up=1)
    (first, _), (second, _) = made
    expected = [(first, second, 1, 0, -1), (second, first, 1, 0, -1), "loss", "loss"]
    assert calls == expected + [(first, second, 1, 1, 0), (second, first, 0, 1, 0)]
    logits = [network.eval()(torch.ones(2, 3, 8, 8))[0] for network in (first, second)]
    torch.testing.assert_close(both.eval()(torch.ones(2, 3, 8, 8))[0], sum(logits) / 2)


def other_labels(name, n=20):
    """The labels after one step of the rule of the entry `name` of STUDY, n images; their answers and neighbours."""
    _, probs, features = coloured(n, CLASSES)
    probs = probs**2 / (probs**2).sum(1, keepdim=True) * torch.tensor([1.0, 0.7, 0.4])
    probs = probs / probs.sum(1, keepdim=True)
    with baselines.exchanged(STUDY[name].rule):
        labels = tclip.EnsembleLabels(probs, momentum=0.0, neighbours=3)
        labels.update(slice(None), probs, features)
    return labels.targets(slice(None)), labels.candour.item(), probs, tclip.neighbour_mean(features, probs, 3)


@pytest.mark.parametrize("name", [name for name, method in STUDY.items() if "bayes_rule" in method.rule])
def test_other_rules(name):
    """q ~ prior^candour x likelihood^sharpness as the entry's name says, in loops."""
    q, candour, answers, near = other_labels(name)
    of = {key: p.default for key, p in inspect.signature(tclip.bayes_rule).parameters.items()}
    sharpness = float(name.split()[1]) if "sharpness" in name else of["sharpness"]
    mass, mean = answers.mean(0).tolist(), answers.mean(0).tolist()
    assert 0 < candour < 1
    for i in range(len(q)):
        row = []
        for c in range(CLASSES):
            prior = answers[i, c].item() if "prior" in name else mass[c] * answers[i, c].item() / mean[c]
            likelihood = (near[i, c].item() + of["smoothing"] * mass[c]) / (1 if "mass" in name else mass[c])
            row.append(prior**candour * likelihood**sharpness)
        assert q[i].tolist() == pytest.approx([value / sum(row) for value in row], abs=2e-3)  # answers are float16


def test_other_starts():
    """Candour is fixed where it is; one round is one step from the answers; and tclip's own rule is back afterwards."""
    own = tclip.bayes_rule, tclip.candour, tclip.EnsembleLabels
    assert other_labels("candour 0")[1] == 0 and other_labels("candour 1")[1] == 1
    _, probs, features = coloured(20, CLASSES)
    rule = 0.5, 3, torch.tensor([0.2, 0.3, 0.5])
    once, step = baselines.OneRound(probs, features, *rule), tclip.EnsembleLabels(probs, None, *rule)
    step.update(slice(None), step.targets(slice(None)), features)
    assert torch.equal(once.table, step.table) and torch.equal(once.answers, once.table)
    with pytest.raises(ZeroDivisionError), baselines.exchanged(STUDY["candour 1"].rule):
        assert tclip.candour is not own[1]
        1 / 0
    assert own == (tclip.bayes_rule, tclip.candour, tclip.EnsembleLabels)


@pytest.mark.parametrize("name", METHODS | STARTED | STUDY)
def test_every_method(name):
    """Two epochs give finite predictions of every image, without the truth; labels stay where they are fixed, and what
    is changed of tclip changes its labels."""
    method, prior = (METHODS | STARTED | STUDY)[name], "none" if name in STUDY else "uniform"
    config = settings(epochs=2, class_prior=prior)
    student, labels = method.run(config, images())
    probs = tclip.predict(student, images().pixels)
    assert probs.shape == (N, CLASSES) and probs.isfinite().all()
    if name in ("SupCon + CE", "Co-teaching"):  # the same seed gives the same student, another one another
        others = [method.run(replace(config, seed=seed), images())[0] for seed in (0, 1)]
        assert [torch.equal(tclip.predict(s, images().pixels), probs) for s in others] == [True, False]
    if method.two_networks:
        assert labels is None
    elif method.settings.get("label_momentum") == 1 and "ELR" not in name:
        begun, shares = images().probs, torch.full((CLASSES,), 1 / CLASSES)
        if method.started:
            begun = tclip.EnsembleLabels(begun, images().features, 0.5, 3, shares).targets(slice(None))
        known = shares if prior == "uniform" and "class_prior" not in method.settings else None
        fixed = tclip.EnsembleLabels(method.targets(begun), None, 1, 3, known)
        assert torch.equal(labels, fixed.targets(slice(None)))
    else:
        assert torch.equal(labels, METHODS["tclip"].run(config, images())[1]) == (name == "tclip")
