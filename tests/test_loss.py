"""The class-conditional contrastive loss, against its formula in plain loops and against the losses it contains."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tclip import class_conditional_contrastive_loss as c3l

CLASS_SHARES, NEGATIVES = (0.0, 1.0, 0.3), ("all", "other", "same")  # pulled by instance, by class, by both
SWITCHES = list(itertools.product(CLASS_SHARES, NEGATIVES))


def unit_rows(n, dim, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def soft_labels(n, classes, seed=0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def one_hot(*labels, classes=3):
    return F.one_hot(torch.tensor(labels), classes).float()


def plain(z, targets, temperature, class_share, negatives):
    """The formula of the docstring, a pair at a time, in double precision."""
    z, t, n = z.double().tolist(), targets.double().tolist(), len(z)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))  # noqa: E731
    total = 0.0
    for i in range(n):
        other_view, rest = (i + n // 2) % n, [j for j in range(n) if j != i]
        s = {j: dot(z[i], z[j]) / temperature for j in rest}
        a = {j: dot(t[i % len(t)], t[j % len(t)]) for j in rest}
        same = {j: a[j] for j in rest} | {other_view: 1}
        w = {j: class_share * same[j] / sum(same.values()) + (1 - class_share) * (j == other_view) for j in rest}
        v = {j: {"all": 1, "other": 1 - a[j], "same": a[j]}[negatives] for j in rest} | {other_view: 1}
        for j in rest:
            pushed = sum((1 if k == j else v[k]) * math.exp(s[k]) for k in rest)
            total -= w[j] * (s[j] - math.log(pushed))
    return total / n


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
@pytest.mark.parametrize("targets", [soft_labels(6, 4), one_hot(0, 1, 1, 2, 2, 2)], ids=["soft", "one-hot"])
def test_formula(class_share, negatives, targets):
    """Every pair of switches is the docstring's formula, at a usual, a high and a low temperature."""
    z = unit_rows(12, 5)
    for temperature in (0.2, 1.0, 0.05):
        loss = c3l(z, targets, temperature, class_share, negatives)
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(plain(z, targets, temperature, class_share, negatives), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
def test_gradient(class_share, negatives):
    """The float32 gradient is the central difference of the double-precision loops (the loss itself casts to float32,
    so that torch.autograd.gradcheck in double precision cannot be had)."""
    z, targets = unit_rows(6, 4).requires_grad_(), soft_labels(3, 3)
    c3l(z, targets, 0.3, class_share, negatives).backward()
    for row, column in itertools.product(range(6), range(4)):
        ends = []
        for step in (1e-5, -1e-5):
            moved = z.detach().double()
            moved[row, column] += step
            ends.append(plain(moved, targets, 0.3, class_share, negatives))
        assert z.grad[row, column].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)


def test_simclr():
    """By instance, all pushed: NT-Xent, cross-entropy of "which other row is my other view?", whatever the labels."""
    z, n = unit_rows(16, 8), 16
    similarity = z @ z.T / 0.1
    choices = torch.stack([torch.cat([row[:i], row[i + 1 :]]) for i, row in enumerate(similarity)])  # without itself
    answer = [other - (other > i) for i in range(n) for other in [(i + n // 2) % n]]
    expected = F.cross_entropy(choices, torch.tensor(answer))
    for targets in (soft_labels(8, 5), one_hot(*[1] * 8)):
        torch.testing.assert_close(c3l(z, targets, 0.1, 0.0, "all"), expected)


def test_supcon():
    """By class, all pushed, with one-hot labels is SupCon (Khosla et al. 2020, equation 2)."""
    z, labels = unit_rows(14, 8), torch.tensor([0, 1, 2, 2, 1, 2, 0])
    row_labels = labels.repeat(2)
    losses = []
    for i in range(14):
        everyone = [a for a in range(14) if a != i]
        classmates = [p for p in everyone if row_labels[p] == row_labels[i]]
        log_denominator = torch.logsumexp(torch.stack([z[i] @ z[a] / 0.1 for a in everyone]), 0)
        losses.append(-torch.stack([z[i] @ z[p] / 0.1 - log_denominator for p in classmates]).mean())
    torch.testing.assert_close(c3l(z, one_hot(*labels), 0.1, 1.0, "all"), torch.stack(losses).mean())


def test_other_never_pushes_classmates():
    """By instance, others pushed, all images of one class: there is nothing to push, loss and gradient are zero."""
    z = unit_rows(8, 6).requires_grad_()
    loss = c3l(z, one_hot(1, 1, 1, 1), 0.5, 0.0, "other")
    loss.backward()
    assert abs(loss.item()) < 1e-6 and z.grad.abs().max() < 1e-6


LABELS = {
    "a class each": one_hot(0, 1, 2, 3, classes=4),
    "one image of a class": one_hot(0, 0, 0, 1),
    "all of one class": one_hot(2, 2, 2, 2),
    "one image": one_hot(1),
    "two images": one_hot(0, 1),
    "one class": torch.ones(4, 1),
}


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
@pytest.mark.parametrize("targets", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_hard_cases(class_share, negatives, targets, temperature):
    """Anchors without classmates, without others, cold: right to the formula, above zero, and a finite gradient."""
    z = unit_rows(2 * len(targets), 8, seed=3).requires_grad_()
    loss = c3l(z, targets, temperature, class_share, negatives)
    loss.backward()
    expected = plain(z.detach(), targets, temperature, class_share, negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-4) and loss > -1e-5
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(class_share, negatives, dtype):
    """Rows in half precision are summed in float32, also under autocast; exp(1 / 0.05) would overflow a float16."""
    z, targets = unit_rows(12, 8).to(dtype).requires_grad_(), soft_labels(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        loss = c3l(z, targets, 0.05, class_share, negatives)
    loss.backward()
    assert loss.dtype == torch.float32 and z.grad.isfinite().all()
    assert loss.item() == pytest.approx(plain(z.detach(), targets, 0.05, class_share, negatives), rel=1e-5)


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
def test_symmetry(class_share, negatives):
    """Neither the order of the images nor which view comes first matters."""
    z, targets, order = unit_rows(10, 6), soft_labels(5, 3), torch.tensor([3, 0, 4, 2, 1])
    loss = c3l(z, targets, 0.2, class_share, negatives)
    first, second = z.chunk(2)
    swapped = c3l(torch.cat([second, first]), targets, 0.2, class_share, negatives)
    permuted = c3l(torch.cat([first[order], second[order]]), targets[order], 0.2, class_share, negatives)
    torch.testing.assert_close(swapped, loss)
    torch.testing.assert_close(permuted, loss)


@pytest.mark.parametrize("class_share, negatives", SWITCHES)
def test_inputs_untouched(class_share, negatives):
    """Labels need no gradient, and neither argument is written to."""
    z, targets = unit_rows(8, 4), soft_labels(4, 3)
    kept = z.clone(), targets.clone()
    loss = c3l(z.requires_grad_(), targets, 0.2, class_share, negatives)
    loss.backward()
    assert z.grad.abs().sum() > 0 and targets.grad is None
    assert torch.equal(z, kept[0]) and torch.equal(targets, kept[1])


def test_unknown_negatives():
    """A misspelt switch is an error, not a silent fourth loss."""
    with pytest.raises(KeyError):
        c3l(unit_rows(4, 3), soft_labels(2, 3), negatives="others")
