"""Ensemble labels: the rule in plain loops, what it must do at its limits. (On real features: test_pseudo_labels.)"""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tclip import EnsembleLabels, bayes_rule, nearest, verdict, with_shares
from tclip_app.train import TrustedLabels

SMOOTHING = inspect.signature(bayes_rule).parameters["smoothing"].default
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


def loop_neighbours(places, k):
    every = set(range(len(places)))
    return [sorted(every - {i}, key=lambda j, i=i: -places[i] @ places[j])[:k] for i in range(len(places))]


def loop_verdict(answers, near, enough=0.86):
    told = [i for i, answer in enumerate(answers) if answer.max() > answer.min()]
    odds = [math.log(second / first) for first, second in (sorted(answers[i])[-2:] for i in told)]
    trust = min(1, math.log(max(20, 1.5 * (answers.shape[1] - 1))) / (sum(odds) / len(odds)))
    claim = foretold = conceded = 0
    for i in told:
        answer, choice = answers[i] ** trust / (answers[i] ** trust).sum(), near[i].argmax()
        claim += answer.max()
        foretold += choice == answer.argmax()
        conceded += answer[choice]
    return trust * (conceded / claim < enough), min(1.5, 1.5 * (foretold / claim / 0.9) ** 4)


def loop_bayes(answers, near, mass, a, s):
    q = np.empty_like(answers)
    for i, c in np.ndindex(q.shape):
        density = (near[i, c] + SMOOTHING * mass[c]) / mass[c]
        q[i, c] = (mass[c] * answers[i, c] / answers[:, c].mean()) ** a * density**s
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
        assert nearest(places, k).tolist() == loop_neighbours(places, k)
    near, mass = said[nearest(places, 7)].mean(1), said.mean(0)
    for a, s in ((1.0, 1.5), (0.3, 2.0), (0.0, 0.1)):
        expected = loop_bayes(*(x.double().numpy() for x in (answers, near, mass)), a, s)
        np.testing.assert_allclose(bayes_rule(answers, near, mass, a, s), expected, atol=1e-6)
    hard = F.one_hot(answers.argmax(1), CLASSES).float().clamp_min(1e-6)
    for probs, close in ((answers, 1e-5), (hard, 4e-3)):
        result = with_shares(probs, torch.tensor(SHARES))
        np.testing.assert_allclose(result, loop_shares(probs.double().numpy(), SHARES), atol=close)
        np.testing.assert_allclose(result.mean(0), SHARES, atol=close)
        np.testing.assert_allclose(result.sum(1), 1, atol=1e-5)
    found = nearest(places, 3, pool=10)  # the neighbours of all are among the same ten
    members = found.unique().tolist()
    assert 5 < len(members) <= 10 and max(members) > 10
    for i in range(N):
        assert found[i].tolist() == sorted({*members} - {i}, key=lambda j, i=i: -places[i] @ places[j])[:3]


def test_verdict():
    """It is the loop. Of a teacher whose word is not missed: a = 0; of a worse one: a = 1, or less if it is surer; the
    less the neighbourhoods foretell, the less they count; and they count in full where the teacher claims less than
    they foretell. Even answers are none."""
    answers, found = answers_of(), []
    for sure, wrong in ((1, 0), (1, 12), (1, 36), (1, 48), (0.2, 12), (4, 36)):
        near = F.one_hot((answers.argmax(1) + (torch.arange(N) < wrong)) % CLASSES, CLASSES).float()
        said = F.normalize(answers**sure, p=1, dim=1)
        found.append(verdict(said, near).tolist())
        uneven = verdict(torch.cat([said, torch.full_like(said, 1 / CLASSES)]), torch.cat([near, near])).tolist()
        assert uneven == pytest.approx(found[-1])
        assert found[-1] == pytest.approx(loop_verdict(said.double().numpy(), near.double().numpy()))
    trust, sharpness = zip(*found)
    assert trust[:5] == (0, 0, 1, 1, 0) and sharpness[0] == sharpness[4] == 1.5 > sharpness[2] > sharpness[3] > 0
    odds = (answers.log().topk(2).values.mean(0) * torch.tensor([4, -4])).sum()
    assert trust[5] * odds == pytest.approx(math.log(20), abs=1e-4) and odds > math.log(20)


def test_many_classes():
    """Certain answers count 0.6 where classes are many, so that features that know nothing hardly overrule them, and
    good ones mend them."""
    draw = torch.Generator().manual_seed(0)
    truth, wrong = torch.randint(100, (1500,), generator=draw), torch.rand(1500, generator=draw) < 0.3
    answers = F.one_hot(torch.where(wrong, torch.randint(100, (1500,), generator=draw), truth), 100).float()
    trust = verdict(answers.clamp_min(1e-6), answers, enough=math.inf)[0]
    assert (trust * answers.clamp_min(1e-6).log()).softmax(1).amax(1).mean() == pytest.approx(0.6, abs=1e-3)
    blind = torch.randn(1500, 64, generator=draw)
    seeing = 3 * torch.randn(100, 64, generator=draw)[truth] + blind
    right = [(EnsembleLabels(answers, x).table.argmax(1) == truth).float().mean() for x in (blind, seeing)]
    assert right[0] > 0.65 < 0.95 < right[1] and answers[range(1500), truth].mean() < 0.75


@pytest.mark.parametrize("momentum, prior", [(0.0, None), (0.7, None), (0.7, SHARES)])
def test_epochs(momentum, prior):
    """Rounds in the teacher's features, then epochs of random visits in which some images are seen often and others,
    which keep their label, never, are these loops. What was recorded in an epoch is not counted in the next. The
    exponents change after five rounds, and after two epochs; the teacher's word may come back later."""
    shares = None if prior is None else torch.tensor(prior)
    labels = EnsembleLabels(answers_of(), places_of(), momentum, 5, shares, trial=2)

    def follow(table, answers, said, places, exponents):
        near, mass = np.stack([said[others].mean(0) for others in places]), said.mean(0)
        q = loop_bayes(answers, near, mass, *exponents)
        return momentum * table + (1 - momentum) * (q if prior is None else loop_shares(q, prior)), near

    table = answers_of().double().numpy()
    table = answers = table if prior is None else loop_shares(table, prior)
    exponents = 0, 1.5
    for step in range(20):
        table, near = follow(table, answers, table, loop_neighbours(places_of(), 5), exponents)
        if step == 4:
            exponents = loop_verdict(answers, near, math.inf)
    np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)  # float16
    answers, rng, exponents, last = table.copy(), np.random.default_rng(0), (0, 1.5), near
    for epoch in range(4):
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
        places = loop_neighbours(places / np.linalg.norm(places, axis=1, keepdims=True), 5)
        table[seen], near = follow(table[seen], answers[seen], said, places, exponents)
        last[seen] = near
        np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)
        np.testing.assert_allclose(labels.near, last, atol=2e-3)
        if epoch >= 1:
            trust, sharpness = loop_verdict(answers[seen], near, 0.86 if epoch == 1 else 0.7)
            exponents = max(exponents[0], trust), sharpness if epoch == 1 else exponents[1]
        np.testing.assert_allclose(labels.exponents, exponents, atol=0.02)


def test_limits():
    """Neighbourhoods that say what all images say, and features that know nothing, leave the teacher's labels as they
    are. The order of the classes does not matter, and a class that is split into two halves does not grow. Features
    make a fair teacher better."""
    answers, places, other = answers_of(), places_of(), [2, 0, 3, 1]
    mass, near = answers.mean(0), answers[nearest(places, 7)].mean(1)
    torch.testing.assert_close(bayes_rule(answers, mass.expand(N, CLASSES), mass), answers)
    assert torch.equal(EnsembleLabels(answers, places, neighbours=N).table.argmax(1), answers.argmax(1))
    blind = EnsembleLabels(answers, torch.randn(N, 8, generator=torch.Generator().manual_seed(0)))
    assert (blind.table.argmax(1) == answers.argmax(1)).float().mean() > 0.95
    before, after = ((x.argmax(1) == TRUTH).float().mean() for x in (answers, EnsembleLabels(answers, places).table))
    assert 0.5 < before < 0.8 and after > before + 0.15
    for prior in (torch.tensor(SHARES), None):
        table = EnsembleLabels(answers, places, class_prior=prior).targets(EVERY)
        moved = EnsembleLabels(answers[:, other], places, class_prior=prior if prior is None else prior[other])
        torch.testing.assert_close(moved.targets(EVERY), table[:, other], rtol=0, atol=2e-3)
    split = [torch.cat([x[..., :1] / 2, x[..., :1] / 2, x[..., 1:]], -1) for x in (answers, near, mass)]
    whole = bayes_rule(answers, near, mass)
    torch.testing.assert_close(bayes_rule(*split), torch.cat([whole[:, :1] / 2, whole[:, :1] / 2, whole[:, 1:]], 1))


def test_wandering():
    """Labels that pass the trial, and then drift off, since classes overlap and are 10 : 1: the teacher's word is
    missed, and brings them back; not where they mend its errors. In its own features it always counts."""
    truth, draw = (torch.arange(220) < 20).long(), torch.Generator().manual_seed(0)
    places = F.normalize(torch.randn(220, 8, generator=draw) + 2 * F.one_hot(truth, 8), dim=1)
    answers, right, trust = F.one_hot(truth, 2).clamp(1e-3, 1 - 1e-3), [], []
    labels = EnsembleLabels(answers, trial=5)
    for _ in range(60):
        labels.record(torch.arange(220), labels.targets(slice(None)), places)
        labels.end_epoch()
        right.append((labels.table.argmax(1) == truth).float().mean().item())
        trust.append(labels.exponents[0].item())
    assert trust[4] == 0 < trust[-1] < 1 and min(right) < 0.9 < 0.97 < right[-1]
    assert (EnsembleLabels(answers, places).table.argmax(1) == truth).float().mean() > 0.97
    wrong = torch.where(torch.arange(220)[:, None] % 4 == 0, answers.flip(1), answers)  # a quarter
    labels = EnsembleLabels(wrong, trial=5)
    for epoch in range(20):
        labels.record(torch.arange(220), wrong if epoch < 5 else answers, answers if epoch >= 5 else wrong)
        labels.end_epoch()
    assert labels.exponents[0] == 0 and torch.equal(labels.table.argmax(1), truth)


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
    assert targets.min() >= 0 and (targets.sum(1) - 1).abs().max() < 1e-6
    assert prior is None or (targets.mean(0) - torch.tensor(prior)).abs().max() < 0.01


def test_state():
    """Saved labels go on as those that were not. The final ones are their mean with the predictions, times how much
    denser than usual each class is around the image, if that is known, as far as s says. At momentum 1 nothing is
    recorded, and nothing changes."""
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
    labels.exponents[1], predictions = 0.6, answers_of(seed=9)
    resumed = EnsembleLabels(answers_of(seed=5))
    resumed.load_state_dict(labels.state_dict())
    near = answers_of(seed=2)[nearest(places_of(seed=2), 15)].mean(1)
    both = (labels.targets(EVERY) + 0.4 * predictions) / 1.4
    expected = F.normalize(both * (near / both.mean(0) + 0.1) ** 0.6, p=1, dim=1)
    for table in (labels, resumed):
        torch.testing.assert_close(table.final(predictions), expected, rtol=0, atol=2e-3)
    assert torch.equal(fixed.final(predictions), fixed.targets(EVERY))
    begun = EnsembleLabels(answers_of()).final(predictions)
    torch.testing.assert_close(begun, (answers_of().half().float() + predictions) / 2, rtol=0, atol=1e-3)


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
    fixed = TrustedLabels(answers_of(), None, 1, *how[1:], trusted=trusted)
    for table in (labels[0], fixed, TrustedLabels(answers_of(), places_of(), *how, trusted=trusted)):
        for end in (table.targets(EVERY), table.final(said.roll(1, 1))):
            torch.testing.assert_close(end[known], right[known], rtol=0, atol=1e-3)
