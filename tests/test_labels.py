"""Ensemble labels: the rule in plain loops, what it must do at its limits. (On real features: test_pseudo_labels.)"""

import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tclip import EnsembleLabels, bayes_rule, candour, neighbour_mean, with_shares
from tclip_app.train import TrustedLabels

STEPS, POWER, OWN = 41, 8, 0.01  # of candour(): exponents that it tries, its power, the weight of the answers' own word
SHARPNESS, SMOOTHING = (inspect.signature(bayes_rule).parameters[name].default for name in ("sharpness", "smoothing"))
N, CLASSES, SHARES = 60, 4, (0.4, 0.3, 0.2, 0.1)
TRUTH, EVERY = torch.arange(N) % CLASSES, torch.arange(N)


def answers_of(truth=TRUTH, seed=0):
    """A teacher that is mostly right."""
    noise = torch.randn(len(truth), CLASSES, generator=torch.Generator().manual_seed(seed))
    return (1.5 * F.one_hot(truth, CLASSES) + 1.5 * noise).softmax(1)


def places_of(truth=TRUTH, seed=0):
    """Embeddings in which most neighbours share a class."""
    noise = torch.randn(len(truth), 8, generator=torch.Generator().manual_seed(seed))
    return F.normalize(F.one_hot(truth, 8) + 0.3 * noise, dim=1)


def loop_neighbours(places, said, k):
    order = [sorted(set(range(len(said))) - {i}, key=lambda j, i=i: -places[i] @ places[j]) for i in range(len(said))]
    return np.stack([said[others[:k]].mean(0) for others in order])


def loop_candour(answers, near):
    def foretold(candid):
        flat = answers**candid ** (1 / POWER)
        flat = np.log(flat / flat.sum(1, keepdims=True))
        return (OWN * answers * flat).sum() + sum(n.max() ** POWER * f[n.argmax()] for n, f in zip(near, flat))

    return max(np.linspace(0, 1, STEPS), key=foretold)


def loop_bayes(answers, near, mass, candid):
    q = np.empty_like(answers)
    for i, c in np.ndindex(q.shape):
        density = (near[i, c] + SMOOTHING * mass[c]) / mass[c]
        q[i, c] = (mass[c] * answers[i, c] / answers[:, c].mean()) ** candid * density**SHARPNESS
    return q / q.sum(1, keepdims=True)


def loop_shares(probs, shares):
    """Sinkhorn and Knopp: columns of N x share and rows of 1, in turns."""
    for _ in range(3000):
        probs = probs * (np.array(shares) * len(probs) / probs.sum(0))
        probs = probs / probs.sum(1, keepdims=True)
    return probs


def test_loops():
    """The functions are those loops."""
    answers, places, said = answers_of(), places_of(), answers_of(seed=1)
    for k in (1, 7, N + 5):
        np.testing.assert_allclose(neighbour_mean(places, said, k), loop_neighbours(places, said.numpy(), k), atol=1e-6)
    near, mass = neighbour_mean(places, said, 7), said.mean(0)
    for word in (answers, F.normalize(answers.square(), p=1, dim=1)):
        expected = loop_candour(word.double().numpy(), near.double().numpy())
        assert candour(word, near) == pytest.approx(expected) and 0 < expected < 1
    for candid in (1.0, 0.3, 0.0):
        expected = loop_bayes(*(x.double().numpy() for x in (answers, near, mass)), candid)
        np.testing.assert_allclose(bayes_rule(answers, near, mass, candid), expected, atol=1e-6)
    hard = F.one_hot(answers.argmax(1), CLASSES).float().clamp_min(1e-6)
    for probs, close in ((answers, 1e-5), (hard, 4e-3)):
        result = with_shares(probs, torch.tensor(SHARES))
        np.testing.assert_allclose(result, loop_shares(probs.double().numpy(), SHARES), atol=close)
        np.testing.assert_allclose(result.mean(0), SHARES, atol=close)
        np.testing.assert_allclose(result.sum(1), 1, atol=1e-5)
    means = neighbour_mean(places, torch.eye(N), 3, pool=10)  # row i: 1/3 at each neighbour of i, of the same ten
    members = means.sum(0).nonzero()[:, 0].tolist()
    assert 5 < len(members) <= 10 and max(members) > 10 and (means.diag() == 0).all()
    for i in set(range(N)) - set(members):
        nearest = sorted(members, key=lambda j, i=i: -places[i] @ places[j])[:3]
        torch.testing.assert_close(means[i], F.one_hot(torch.tensor(nearest), N).sum(0) / 3)


@pytest.mark.parametrize("momentum, prior", [(0.0, None), (0.7, None), (0.7, SHARES)])
def test_epochs(momentum, prior):
    """Rounds in the teacher's features, then epochs of random visits in which some images are seen often and others,
    which keep their label, never, are these loops. What was recorded in an epoch is not counted in the next."""
    labels = EnsembleLabels(answers_of(), places_of(), momentum, 5, None if prior is None else torch.tensor(prior))

    def follow(table, answers, said, places):
        near, mass = loop_neighbours(places, said, 5), said.mean(0)
        q = loop_bayes(answers, near, mass, candid := loop_candour(answers, near))
        return momentum * table + (1 - momentum) * (q if prior is None else loop_shares(q, prior)), candid

    table = answers_of().double().numpy()
    table = answers = table if prior is None else loop_shares(table, prior)
    for _ in range(20):
        table, _ = follow(table, answers, table, places_of().double().numpy())
    np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)  # float16
    answers, rng = table.copy(), np.random.default_rng(0)
    for epoch in range(3):
        said, places = np.zeros((N, CLASSES)), np.zeros((N, 8))
        for seed in range(10 * epoch, 10 * epoch + 6):
            index = torch.from_numpy(rng.integers(N, size=16))  # an image may be there twice
            rows = answers_of(TRUTH[index], seed), places_of(TRUTH[index], seed)
            labels.record(index, *rows)
            for sums, row in zip((said, places), rows):
                np.add.at(sums, index.numpy(), row.double().numpy())
        labels.end_epoch()
        seen = said.sum(1) > 0
        assert 20 < seen.sum() < N
        said, places = said[seen] / said[seen].sum(1, keepdims=True), places[seen]
        places = places / np.linalg.norm(places, axis=1, keepdims=True)
        table[seen], candid = follow(table[seen], answers[seen], said, places)
        np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)
        assert labels.candour == pytest.approx(candid)


def test_candour():
    """It is 1 of a teacher that is right as often as it says or oftener; the more it overstates, the less it is."""
    near = F.one_hot(torch.tensor([0] * 300 + [1] * 100 + [1] * 300 + [0] * 100), 2).float()
    said = torch.tensor([[0.75, 0.25]] * 400 + [[0.25, 0.75]] * 400)  # right in 3 of 4 cases
    found = [candour(F.normalize(said**power, p=1, dim=1), near) for power in (0.5, 1, 1.1, 1.3, 3)]
    assert found[:2] == [1, 1] and found[1] > found[2] > found[3] > found[4] and found[4] < 0.1


def test_limits():
    """Neighbourhoods that say what all images say leave the teacher's labels as they are. The order of the classes
    does not matter, and a class that is split into two halves does not grow. Features make a fair teacher better."""
    answers, places, other = answers_of(), places_of(), [2, 0, 3, 1]
    mass, near = answers.mean(0), neighbour_mean(places, answers, 7)
    torch.testing.assert_close(bayes_rule(answers, mass.expand(N, CLASSES), mass), answers)
    assert torch.equal(EnsembleLabels(answers, places, neighbours=N).table.argmax(1), answers.argmax(1))
    before, after = ((x.argmax(1) == TRUTH).float().mean() for x in (answers, EnsembleLabels(answers, places).table))
    assert 0.5 < before < 0.8 and after > before + 0.15
    for prior in (torch.tensor(SHARES), None):
        table = EnsembleLabels(answers, places, class_prior=prior).targets(EVERY)
        moved = EnsembleLabels(answers[:, other], places, class_prior=prior if prior is None else prior[other])
        torch.testing.assert_close(moved.targets(EVERY), table[:, other], rtol=0, atol=2e-3)
    split = [torch.cat([x[..., :1] / 2, x[..., :1] / 2, x[..., 1:]], -1) for x in (answers, near, mass)]
    whole = bayes_rule(answers, near, mass)
    torch.testing.assert_close(bayes_rule(*split), torch.cat([whole[:, :1] / 2, whole[:, :1] / 2, whole[:, 1:]], 1))


@pytest.mark.parametrize("prior", [None, SHARES])
@pytest.mark.parametrize("kind", ["soft", "hard", "ranked"])
def test_teachers(kind, prior):
    """Every kind of teacher, and a class that it never names, gives labels on the simplex, though they are kept in
    float16; known shares are met."""
    answers, order = answers_of(), answers_of().argsort(1, descending=True).argsort(1)
    answers = dict(soft=answers, hard=(order == 0).float(), ranked=(order < 2) / (1.0 + order))[kind]
    answers = F.normalize(answers * torch.tensor([1, 1, 1, prior is not None]), p=1, dim=1)
    labels = EnsembleLabels(answers, places_of(), 0.99, 5, prior if prior is None else torch.tensor(prior))
    for _ in range(3):
        labels.record(EVERY, answers, places_of(seed=1))
        labels.end_epoch()
    targets = labels.targets(EVERY)
    assert targets.min() >= 0 and 0 <= labels.candour <= 1 and (targets.sum(1) - 1).abs().max() < 1e-6
    assert prior is None or (targets.mean(0) - torch.tensor(prior)).abs().max() < 0.01


def test_state():
    """Saved labels go on as those that were not. At momentum 1 nothing is recorded, and nothing changes."""
    labels, fixed = (EnsembleLabels(answers_of(), places_of(), momentum) for momentum in (0.5, 1))
    for seed in (1, 2):
        resumed = EnsembleLabels(answers_of(seed=5), places_of(seed=5))
        resumed.load_state_dict(labels.state_dict())
        for each in (labels, resumed, fixed):
            each.record(EVERY, answers_of(seed=seed).requires_grad_(), places_of(seed=seed).requires_grad_())
            assert each is not fixed or (each.embeddings is None and each.predictions.count_nonzero() == 0)
            each.end_epoch()
        assert not labels.table.requires_grad and all(map(torch.equal, labels.buffers(), resumed.buffers()))
    assert torch.equal(fixed.table, answers_of().half()) and not torch.equal(labels.table, fixed.table)


@pytest.mark.parametrize("prior", [None, SHARES])
def test_trusted(prior):
    """Labels that are known stay, from CLIP's features and from the student's, whatever is said of their images; among
    the neighbours of others they count as what is said."""
    trusted = torch.where(EVERY % 7 == 0, (TRUTH + 1) % CLASSES, -1)
    known, right = trusted >= 0, F.one_hot(trusted.clamp_min(0), CLASSES).float()
    answers, said = (torch.where(known[:, None], right, answers_of(seed=seed)) for seed in (0, 1))
    how = 0.5, 5, None if prior is None else torch.tensor(prior)
    labels = TrustedLabels(answers_of(), None, *how, trusted=trusted), EnsembleLabels(answers, None, *how)
    for table, predictions in zip(labels, (answers_of(seed=1), said)):
        table.record(EVERY, predictions, places_of())
        table.end_epoch()
    assert torch.equal(labels[0].table[~known], labels[1].table[~known])
    for table in (labels[0], TrustedLabels(answers_of(), places_of(), *how, trusted=trusted)):
        torch.testing.assert_close(table.targets(EVERY)[known], right[known], rtol=0, atol=1e-3)
