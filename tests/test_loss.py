"""The class-conditional contrastive loss, against its formula in plain loops and against the losses it contains."""

import math

import pytest
import torch
import torch.nn.functional as F

from tclip import class_conditional_contrastive_loss as c3l


def unit_rows(n, dim, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def soft_labels(n, classes, seed=0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(1)


def one_hot(*labels):
    return F.one_hot(torch.tensor(labels), 3).float()


def plain(z, targets, temperature, class_share):
    """The formula of the docstring, a pair at a time, in double precision."""
    z, t, n = z.double().tolist(), targets.double().tolist(), len(z)
    dot = lambda a, b: sum(x * y for x, y in zip(a, b))  # noqa: E731
    total = 0.0
    for i in range(n):
        other_view, rest = (i + n // 2) % n, [j for j in range(n) if j != i]
        s = {j: dot(z[i], z[j]) / temperature for j in rest}
        a = {j: dot(t[i % len(t)], t[j % len(t)]) for j in rest} | {other_view: 1}
        w = {j: class_share * a[j] / sum(a.values()) + (1 - class_share) * (j == other_view) for j in rest}
        v = {j: 1 - a[j] for j in rest} | {other_view: 1}
        for j in rest:
            pushed = sum((1 if k == j else v[k]) * math.exp(s[k]) for k in rest)
            total -= w[j] * (s[j] - math.log(pushed))
    return total / n


LABELS = {
    "soft": soft_labels(6, 4),
    "hard": one_hot(0, 1, 1, 2, 2, 2),
    "one image of a class": one_hot(0, 0, 0, 1),
    "all of one class": one_hot(2, 2, 2, 2),
    "one class": torch.ones(4, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("class_share", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("targets", LABELS.values(), ids=LABELS.keys())
def test_formula(class_share, targets, dtype):
    """Loss and gradient are the docstring's formula and its central difference, from a usual to a very low temperature,
    for images without classmates or without others too. Half precision, of embeddings and labels, or by autocast, is
    summed in float32."""
    direction = unit_rows(2 * len(targets), 8, seed=4).double()
    targets = targets if dtype == torch.float32 else targets.half()
    for temperature in (0.5, 0.05, 0.01):
        z = unit_rows(2 * len(targets), 8, seed=3).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = c3l(z, targets, temperature, class_share)
        loss.backward()
        near = [z.detach().double() + step * direction for step in (0, 1e-5, -1e-5)]
        value, above, below = (plain(x, targets, temperature, class_share) for x in near)
        assert loss.shape == () and loss.dtype == torch.float32 and loss > -1e-5 and z.grad.isfinite().all()
        assert loss.item() == pytest.approx(value, rel=1e-4, abs=1e-4)
        slope, close = (z.grad.double() * direction).sum().item(), 1e-3 if dtype == torch.float32 else 0.02
        assert slope == pytest.approx((above - below) / 2e-5, rel=close, abs=close)


def test_simclr():
    """Where no image shares a class: NT-Xent, cross-entropy of "which other row is my other view?"."""
    z, n = unit_rows(16, 8), 16
    similarity = (z @ z.T / 0.1).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    expected = F.cross_entropy(similarity, torch.arange(n).roll(n // 2))
    for class_share in (0.0, 0.5, 1.0):
        torch.testing.assert_close(c3l(z, torch.eye(8), 0.1, class_share), expected)
