"""The baselines, against plain implementations of what is published."""

import inspect
import math
import sys
from dataclasses import replace

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
FIXED = tclip.EnsembleLabels(baselines.hard(PROBS), momentum=1.0)
ROWS = [LABELS[i] for i in INDEX.tolist()] * 2


def images():
    """Tiny Images with answers and features, and no truth."""
    pixels, probs, features = coloured(N, CLASSES)
    return tclip.Images([str(i) for i in range(N)], pixels, None, probs, features)


def random_logits(rows, seed=0):
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(seed)).mul(2)


def test_targets():
    """What the methods make of the teacher's probabilities; smoothing is PyTorch's own. Balanced ones have equal class
    masses, and the odds of two classes change by one factor for all images."""
    assert torch.equal(baselines.soft(PROBS), PROBS)
    assert baselines.hard(PROBS).tolist() == [[float(k == label) for k in range(3)] for label in LABELS]
    logits = random_logits(5)
    expected = F.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, baselines.smoothed(PROBS)), expected)
    probs = (3 * random_logits(200) + torch.tensor([3.0, 0.0, -3.0])).softmax(1)
    q = baselines.balanced(probs)
    torch.testing.assert_close(q.mean(0), torch.full((3,), 1 / 3), rtol=2e-3, atol=0)
    near = probs.clamp_min(1e-6)
    factors = (q[:, 0] / q[:, 1]).log() - (near[:, 0] / near[:, 1]).log()
    torch.testing.assert_close(factors, factors.mean().expand(200), rtol=1e-3, atol=1e-3)


def test_gce():
    """Mean over the rows of (1 - p_y^q) / q; and a label that is as good as impossible has a finite gradient."""
    logits, one_hot = random_logits(6), F.one_hot(torch.tensor(ROWS), 3).float()
    plain = [(1 - row[y] ** 0.7) / 0.7 for row, y in zip(logits.softmax(1).tolist(), ROWS)]
    assert baselines.gce(logits, one_hot).item() == pytest.approx(sum(plain) / 6, rel=1e-5)
    impossible = torch.tensor([[-200.0, 0.0, 0.0]], requires_grad=True)
    baselines.gce(impossible, one_hot.new_tensor([[1, 0, 0]])).backward()
    assert impossible.grad.isfinite().all()


def test_sce():
    """alpha * -sum_k y_k log p_k + beta * -sum_k p_k log y_k, where the log of a zero of y is A."""
    logits, total = random_logits(6), 0.0
    for row, label in zip(logits.softmax(1).tolist(), ROWS):
        for k, p in enumerate(row):
            total += 0.1 * -(k == label) * math.log(p) + 2.0 * -p * (0 if k == label else -4)
    one_hot = F.one_hot(torch.tensor(ROWS), 3).float()
    assert baselines.sce(logits, one_hot, beta=2.0).item() == pytest.approx(total / 6, rel=1e-5)


def test_elr():
    """CE + lambda * log(1 - <p, t>), and t <- beta t + (1 - beta) p from zero, over three visits of some images."""
    loss, t = baselines.ELR(beta=0.7, weight=3.0), [[0.0] * 3 for _ in PROBS]
    for visit, batch in enumerate(([4, 1, 2], [0, 4, 3], [4, 2, 1])):
        logits = random_logits(6, seed=visit).requires_grad_()
        p, total = logits.softmax(1).tolist(), 0.0
        for row, i in enumerate(batch):  # its target first, which both views then meet
            t[i] = [0.7 * old + 0.3 * (a + b) / 2 for old, a, b in zip(t[i], p[row], p[row + 3])]
        for row, i in enumerate(batch * 2):
            total += 3.0 * math.log(1 - sum(a * b for a, b in zip(p[row], t[i]))) - math.log(p[row][LABELS[i]])
        value = sum(loss(logits, None, torch.tensor(batch), FIXED, None))
        assert value.item() == pytest.approx(total / 6, rel=1e-3)  # the clamp is 1e-4
        torch.testing.assert_close(loss.table, torch.tensor(t), rtol=0, atol=1e-3)
        value.backward()
    certain = torch.tensor([[100.0, 0, 0]] * 2, requires_grad=True)  # p is kept off the ends
    sum(baselines.ELR(beta=0.0)(certain, None, torch.tensor([0]), FIXED, None)).backward()
    assert certain.grad.isfinite().all() and not loss.table.requires_grad


@pytest.mark.parametrize("name, temperature", [("SimCLR + CE", 0.5), ("SupCon + CE", 0.1)])
def test_contrast(name, temperature):
    """SimCLR's and SupCon's published losses in loops, beside cross-entropy. SimCLR's is what C3L is where no image
    shares a class with another."""
    logits, z = random_logits(6), F.normalize(random_logits(6, seed=1), dim=1)
    cross_entropy, contrastive = METHODS[name].objective()(logits, z, INDEX, FIXED, settings())
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


def test_co_teaching(monkeypatch):
    """The share forgotten grows in equal steps to the teacher's mean doubt; each learns from what the other finds easy,
    on losses made by hand; losses are means of two views."""
    first = torch.tensor([0.1, 0.2, 3.0, 4.0], requires_grad=True)  # finds images 0 and 1 easy
    second = torch.tensor([5.0, 0.3, 0.4, 6.0], requires_grad=True)  # finds images 1 and 2 easy
    asked, exchange = [], baselines.exchange
    sum(exchange(first, second, 0.5)).backward()
    assert first.grad.tolist() == [0, 0.5, 0.5, 0] and second.grad.tolist() == [0.5, 0.5, 0, 0]

    def spy(first, second, forget):
        asked.append(forget)
        assert len(first) == len(second) <= 16 and not torch.equal(first, second)
        return exchange(first, second, forget)

    monkeypatch.setattr(baselines, "exchange", spy)
    baselines.co_teaching(settings(epochs=4), images(), images().probs, forget_epochs=2)
    doubt = 1 - images().probs.max(1).values.mean().item()
    assert asked[::3] == pytest.approx([0, doubt / 2, doubt, doubt])


@pytest.mark.parametrize("name", [name for name, method in STUDY.items() if method.rule])
def test_other_rules(name):
    """q ~ prior^trust x likelihood^sharpness as the entry's name says; and tclip's own rule is back afterwards."""
    own, (_, answers, features), said = dict(vars(tclip)), coloured(N, CLASSES), (random_logits(N) + 1).softmax(1)
    places = tclip.nearest(features, 3)
    with pytest.raises(KeyError), baselines.exchanged(STUDY[name].rule):
        labels = tclip.EnsembleLabels(answers, None, 0.0, 3, trial=1)
        labels.record(torch.arange(N), said, features)
        labels.end_epoch()
        exponents = labels.exponents.tolist()
        labels.update(slice(None), said, places)
        near = labels.near.float()
        once = tclip.EnsembleLabels(answers, features, 0.5, 3)
        raise KeyError
    assert vars(tclip) == own
    mass, (what, _, value) = said.mean(0), name.partition(" ")
    usual = dict(zip(("trust", "sharpness"), tclip.verdict(answers, near).tolist()))
    expected = usual | ({what: float(value)} if what in usual else {})
    assert exponents == pytest.approx([*expected.values()], abs=0.01)
    prior = answers if "prior" in name else mass * answers / answers.mean(0)
    smoothing = inspect.signature(tclip.bayes_rule).parameters["smoothing"].default
    likelihood = (near + smoothing * mass) / (1 if "mass" in name else mass)
    q = prior ** exponents[0] * likelihood ** exponents[1]
    torch.testing.assert_close(labels.targets(slice(None)), q / q.sum(1, keepdim=True), rtol=0.01, atol=1e-3)
    if "round" in name:
        labels = tclip.EnsembleLabels(answers, None, 0.5, 3)
        labels.exponents[0] = 1
        labels.update(slice(None), labels.targets(slice(None)), places)
        assert torch.equal(once.table, labels.table) and torch.equal(once.answers, labels.table)


def test_rule_to_the_end():
    """The last labels are made by the other rule, too."""
    rules = []

    class Watched(tclip.EnsembleLabels):
        def final(self, predictions):
            rules.append(tclip.bayes_rule)
            return super().final(predictions)

    rule = STUDY["without the mass"].rule
    replace(STUDY["without the mass"], rule=rule | dict(EnsembleLabels=Watched)).run(settings(epochs=1), images())
    assert rules == [rule["bayes_rule"]]


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
    elif not name.startswith("trust"):  # tclip's own verdict may be the same
        assert torch.equal(labels, METHODS["tclip"].run(config, images())[1]) == (name == "tclip")
