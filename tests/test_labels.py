"""Ensemble labels, their neighbours and their balancing, against numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tclip import EnsembleLabels, balance, consensus, neighbour_mean


def predictions(n, classes, seed=0, sharpness=1.0):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed)).mul(sharpness).softmax(1)


def sinkhorn(probs, iterations=2000):
    """Row and column factors of Sinkhorn and Knopp: u_i p_ic v_c with rows of 1 and columns of N / C, in numpy."""
    p = probs.double().numpy()
    n, classes = p.shape
    v = np.ones(classes)
    for _ in range(iterations):
        u = 1 / (p @ v)
        v = (n / classes) / (p.T @ u)
    return u[:, None] * p * v


@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_balance_is_sinkhorn(sharpness):
    """balance() is optimal transport to equally large classes; a skewed teacher comes out with columns of 1 / C."""
    probs = predictions(200, 5, sharpness=sharpness) * torch.tensor([1, 1, 0.3, 0.1, 4])
    probs = probs / probs.sum(1, keepdim=True)
    balanced = balance(probs)
    assert (probs.mean(0) - 1 / 5).abs().max() > 0.1  # there was something to do
    np.testing.assert_allclose(balanced, sinkhorn(probs), atol=1e-3)
    np.testing.assert_allclose(balanced.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(balanced.mean(0), 1 / 5, atol=1e-3)
    assert balanced.dtype == torch.float32 and (balanced >= 0).all()


def test_balance_keeps_the_odds():
    """All that balance() does is to multiply each class by one factor: ratios of odds between images stay."""
    probs = predictions(50, 4)
    change = (balance(probs) / probs).log()
    change = change - change[:, :1]  # without the row's own factor
    torch.testing.assert_close(change, change[:1].expand_as(change), rtol=0, atol=1e-4)


def test_balance_twice():
    """Balanced labels are left alone, and so are labels without any opinion."""
    once = balance(predictions(100, 6))
    torch.testing.assert_close(balance(once), once, rtol=0, atol=1e-4)
    flat = torch.full((7, 3), 1 / 3)
    torch.testing.assert_close(balance(flat), flat)


def test_balance_of_extremes():
    """A class that is never named, and labels that are certain, stay finite and on the simplex."""
    never = torch.cat([predictions(40, 3), torch.zeros(40, 1)], 1)
    certain = torch.eye(4)[torch.arange(40) % 3]
    for probs in (never, certain, predictions(1, 5), predictions(3, 10, sharpness=20)):
        balanced = balance(probs)
        assert balanced.isfinite().all() and (balanced >= 0).all()
        np.testing.assert_allclose(balanced.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(balance(never).mean(0), 1 / 4, atol=1e-3)


def neighbours_of(unit, members, k):
    """For each row of `unit`, the k of `members` with the highest cosine, by sorting in numpy."""
    return [sorted(members, key=lambda j: -float(row @ unit[j]))[:k] for row in unit]


def embeddings(n, dim=5, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_neighbour_mean(k):
    """The mean over the k nearest images, itself among them; more neighbours than images are all images."""
    unit, values = embeddings(20), predictions(20, 3)
    expected = [values[chosen].mean(0) for chosen in neighbours_of(unit.numpy(), range(20), k)]
    torch.testing.assert_close(neighbour_mean(unit, values, k), torch.stack(expected))
    if k == 1:
        torch.testing.assert_close(neighbour_mean(unit, values, k), values)


def test_neighbour_pool():
    """With fewer images in the pool than there are, all images take their neighbours from the same random few."""
    unit = embeddings(40)
    shares = neighbour_mean(unit, torch.eye(40), 3, pool=10)  # row i: 1/3 at each neighbour of i
    members = shares.sum(0).nonzero().flatten().tolist()  # each member is a neighbour, of itself for a start
    assert len(members) == 10 and members != list(range(10))
    for row, chosen in zip(shares, neighbours_of(unit.numpy(), members, 3)):
        assert row.nonzero().flatten().tolist() == sorted(chosen)
        torch.testing.assert_close(row[chosen], torch.full((3,), 1 / 3))


def test_consensus_is_scotts_pi():
    """Against Scott's pi of all pairs of raters: here each of 12 images has 5 neighbours, who name one of 3 classes."""
    rng = np.random.default_rng(0)
    names = (rng.integers(3, size=(12, 1)) + (rng.random((12, 5)) < 0.3)) % 3  # mostly of one mind
    pairs = [(a, b) for row in names for a in row for b in row]  # a neighbour is asked with itself, too
    observed = np.mean([a == b for a, b in pairs])
    expected = sum((np.mean(names == c)) ** 2 for c in range(3))
    shares = torch.tensor(np.stack([np.bincount(row, minlength=3) / 5 for row in names]))
    assert consensus(shares) == pytest.approx((observed - expected) / (1 - expected))
    assert 0.2 < consensus(shares) < 0.9


@pytest.mark.parametrize("sharpness", [1.0, 2.5])
@pytest.mark.parametrize("neighbours", [0, 3])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.7, 1.0])
def test_epochs(momentum, balanced, neighbours, sharpness):
    """Several epochs of random visits, of different numbers for each image, against plain numpy."""
    n, classes, rng = 30, 4, np.random.default_rng(0)
    probs = predictions(n, classes)
    labels = EnsembleLabels(probs, momentum, neighbours, sharpness, balanced)
    read = (lambda q: sinkhorn(torch.from_numpy(q))) if balanced else (lambda q: q / q.sum(1, keepdims=True))
    start = read(probs.double().numpy())
    table = start.copy()
    for _ in range(4):
        seen, places = {i: [] for i in range(n)}, {i: [] for i in range(n)}
        for index in [rng.integers(n, size=6) for _ in range(5)]:  # an image may stand in a batch twice
            p = predictions(len(index), classes, seed=int(rng.integers(1000)), sharpness=2)
            z = embeddings(len(index), seed=int(rng.integers(1000)))
            labels.record(torch.from_numpy(index), p, z)
            for i, row, place in zip(index, p.double().numpy(), z.double().numpy()):
                seen[i].append(row)
                places[i].append(place)
        assert not all(seen.values()) and max(map(len, seen.values())) > 1
        labels.end_epoch()
        those = [i for i in range(n) if seen[i]]  # the others keep their label
        q = np.stack([np.mean(seen[i], axis=0) for i in those])
        if neighbours:
            unit = np.stack([np.sum(places[i], axis=0) for i in those])
            unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
            q = np.stack([q[chosen].mean(0) for chosen in neighbours_of(unit, range(len(those)), neighbours)])
        agree = np.mean([sum(p * p for p in row) for row in q])  # two neighbours, asked at random, name one class
        chance = np.mean([np.dot(row, other) for row in q for other in q])  # two neighbours of any two images do
        agree = max(0, (agree - chance) / (1 - chance))  # beyond chance
        trust = agree**sharpness / (agree**sharpness + (1 - agree) ** sharpness)
        assert momentum == 1 or abs(labels.trust - trust) < 1e-3
        q = (1 - trust) * start[those] + trust * read(q**sharpness)
        table[those] = momentum * table[those] + (1 - momentum) * q
        np.testing.assert_allclose(labels.table, table, atol=2e-3)  # float16, and its balancing stops earlier
        np.testing.assert_allclose(labels.table.sum(1, dtype=torch.float32), 1, atol=1e-3)
        assert (labels.table >= 0).all()
        index = torch.tensor([5, 0, 29])
        assert torch.equal(labels.targets(index), labels.table[index].float())


def test_recorded_once():
    """What was recorded in an epoch is not counted in the next."""
    labels = EnsembleLabels(predictions(10, 3), momentum=0.5, neighbours=0)
    labels.record(torch.arange(10), predictions(10, 3, seed=1), embeddings(10))
    labels.end_epoch()
    table = labels.table.clone()
    labels.end_epoch()
    assert torch.equal(labels.table, table)


def test_trust():
    """Groups that are each of one mind are followed. Where all say the same, or nothing, or each something else, there
    is nothing to learn from neighbours, and the teacher's word stays."""
    group = torch.arange(9) % 3
    probs, places = predictions(9, 3), torch.eye(3)[group]  # three groups of three, far apart
    of_one_mind, undecided, mixed = torch.eye(3)[group], torch.full((9, 3), 1 / 3), torch.eye(3)[torch.arange(9) // 3]
    monotonous = torch.tensor([0.8, 0.1, 0.1]).expand(9, 3)
    for said, trust in ((of_one_mind, 1), (undecided, 0), (monotonous, 0), (mixed, 0)):
        labels = EnsembleLabels(probs, momentum=0.0, neighbours=3, sharpness=1.0, balanced=False)
        labels.record(torch.arange(9), said, places)
        labels.end_epoch()
        assert abs(labels.trust - trust) < 1e-3
        torch.testing.assert_close(labels.table.float(), said if trust else probs, rtol=0, atol=1e-3)


def test_unseen_images_keep_their_labels():
    """An image that was not seen in an epoch stays as it was, and the others move."""
    labels = EnsembleLabels(predictions(10, 3), momentum=0.5, neighbours=1)
    begin = labels.table.clone()
    labels.record(torch.arange(4), predictions(4, 3, seed=1), embeddings(4))
    labels.end_epoch()
    assert torch.equal(labels.table[4:], begin[4:])
    assert ((labels.table[:4] - begin[:4]).abs().amax(1) > 1e-3).all()


def test_momentum_limits():
    """m = 1 keeps the teacher's labels for ever; m = 0 takes the mean of the views seen last, as far as trusted."""
    probs, first, second = (predictions(8, 3, seed) for seed in range(3))
    said = (first + second) / 2
    chance = said.mean(0).square().sum()
    trust = (said.square().sum(1).mean() - chance) / (1 - chance)
    for momentum, expected in ((1.0, probs), (0.0, (1 - trust) * probs + trust * said)):
        labels = EnsembleLabels(probs, momentum=momentum, neighbours=0, sharpness=1.0, balanced=False)
        for views in (first, second):
            labels.record(torch.arange(8), views, embeddings(8))
        labels.end_epoch()
        torch.testing.assert_close(labels.table.float(), expected, rtol=0, atol=1e-3)


def test_wrong_label_has_right_neighbours():
    """What the neighbours are for: an odd one out in a tight group takes the group's label."""
    group = torch.tensor([0] * 10 + [1] * 10)
    said = group.clone()
    said[3] = 1  # wrong
    labels = EnsembleLabels(F.one_hot(said, 2).float(), momentum=0.0, neighbours=5, balanced=False)
    places = F.normalize(torch.eye(2)[group] + 0.1 * embeddings(20, dim=2), dim=1)
    labels.record(torch.arange(20), F.one_hot(said, 2).float(), places)
    labels.end_epoch()
    assert torch.equal(labels.table.argmax(1), group)


def test_no_graph():
    """Labels keep no graph of the student, and the teacher's array stays as it was."""
    probs = predictions(6, 3)
    kept = probs.clone()
    labels = EnsembleLabels(probs, momentum=0.5, neighbours=2, balanced=False)
    assert labels.table.data_ptr() != probs.data_ptr()
    labels.record(torch.arange(6), predictions(6, 3, seed=1).requires_grad_(), embeddings(6).requires_grad_())
    labels.end_epoch()
    assert not labels.table.requires_grad and torch.equal(probs, kept)
