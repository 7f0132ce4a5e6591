"""Ensemble labels: the rule in plain loops, what it must do at its limits, and that it is more often right."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tclip import EnsembleLabels, bayes_rule, candour, neighbour_mean, text_classifier, with_shares, zero_shot_probs

STEPS, POWER, OWN = 41, 8, 0.01  # of candour(): exponents that it tries, its power, the weight of the answers' own word
SHARPNESS, SMOOTHING = (inspect.signature(bayes_rule).parameters[name].default for name in ("sharpness", "smoothing"))
N, CLASSES = 60, 4
TRUTH, EVERY = torch.arange(N) % CLASSES, torch.arange(N)


def unit(n=N, dim=5, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def answers_of(truth=TRUTH, classes=CLASSES, seed=0):
    """A teacher that is mostly right, (N, C)."""
    noise = torch.randn(len(truth), classes, generator=torch.Generator().manual_seed(seed))
    return (1.5 * F.one_hot(truth, classes) + 1.5 * noise).softmax(1)


def places_of(truth=TRUTH, seed=0):
    """Embeddings in which most neighbours share a class."""
    return F.normalize(
        F.one_hot(truth, 8) + 0.3 * torch.randn(len(truth), 8, generator=torch.Generator().manual_seed(seed))
    )


def loop_neighbours(places, said, k):
    cosines = places @ places.T
    nearest = [sorted(set(range(len(said))) - {i}, key=lambda j, i=i: -cosines[i, j])[:k] for i in range(len(said))]
    return np.stack([said[chosen].mean(0) for chosen in nearest])


def loop_candour(answers, near):
    def foretold(exponent):
        total = 0
        for word, row in zip(answers, near):
            flat = word**exponent / (word**exponent).sum()
            total += OWN * (word * np.log(flat)).sum() + row.max() ** POWER * math.log(flat[row.argmax()])
        return total

    return max(np.linspace(0, 1, STEPS), key=lambda c: foretold(c ** (1 / POWER)))


def loop_bayes(answers, near, mass, candid):
    rows = [
        [
            (mass[c] * t[c] / answers[:, c].mean()) ** candid * ((n[c] + SMOOTHING * mass[c]) / mass[c]) ** SHARPNESS
            for c in range(len(mass))
        ]
        for t, n in zip(answers, near)
    ]
    return np.array([np.divide(row, sum(row)) for row in rows])


def loop_shares(probs, shares):
    """Sinkhorn and Knopp: rows of 1 and columns of N x share, in turns."""
    for _ in range(3000):
        probs = probs * (np.array(shares) * len(probs) / probs.sum(0))
        probs = probs / probs.sum(1, keepdims=True)
    return probs


def test_loops():
    """The four functions are those loops."""
    answers, places, said = answers_of(), places_of(), answers_of(seed=1)
    for k in (1, 7, N + 5):
        torch.testing.assert_close(
            neighbour_mean(places, said, k).numpy(), loop_neighbours(*map(np.array, (places, said)), k)
        )
    near, mass = neighbour_mean(places, said, 7), said.mean(0)
    assert 0 < candour(answers.square(), near) < 1
    for word in (answers, answers.square() / answers.square().sum(1, keepdim=True)):
        assert candour(word, near) == pytest.approx(loop_candour(word.double().numpy(), near.numpy()))
    for candid in (1.0, 0.3, 0.0):
        expected = loop_bayes(*(x.double().numpy() for x in (answers, near, mass)), candid)
        np.testing.assert_allclose(bayes_rule(answers, near, mass, candid), expected, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_shares(hard):
    """with_shares() is Sinkhorn's transport: the shares are met, and each class is multiplied by one factor."""
    probs, shares = answers_of(), torch.tensor([0.4, 0.3, 0.2, 0.1])
    probs = F.one_hot(probs.argmax(1), CLASSES).float().clamp_min(1e-6) if hard else probs
    result = with_shares(probs, shares)
    np.testing.assert_allclose(result, loop_shares(probs.double().numpy(), shares.numpy()), atol=3e-3 if hard else 1e-5)
    torch.testing.assert_close(result.mean(0), shares, rtol=0, atol=2e-3 if hard else 1e-5)
    torch.testing.assert_close(result.sum(1), torch.ones(N))
    factors = (result / probs)[:, 1:] / (result / probs)[:, :1]
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-3, atol=0)


def said_of(visits, count, column):
    """The plain mean of what was recorded of each image, and the images that were seen."""
    sums = np.zeros((N, count))
    for index, *rows in visits:
        np.add.at(sums, index.numpy(), rows[column].double().numpy())
    return sums


@pytest.mark.parametrize("momentum, prior", [(0.0, None), (0.7, None), (0.7, (0.4, 0.3, 0.2, 0.1))])
def test_epochs(momentum, prior):
    """Rounds in the teacher's features, then epochs of random visits in which some images are seen often, some never,
    are these loops. What was recorded in an epoch is not counted in the next."""
    shares = None if prior is None else torch.tensor(prior)
    labels = EnsembleLabels(answers_of(), places_of(), momentum, 5, shares)

    def follow(table, answers, said, places):
        near, mass = loop_neighbours(places, said, 5), said.mean(0)
        q = loop_bayes(answers, near, mass, candid := loop_candour(answers, near))
        return momentum * table + (1 - momentum) * (q if prior is None else loop_shares(q, prior)), candid

    table = answers = (
        answers_of().double().numpy() if prior is None else loop_shares(answers_of().double().numpy(), prior)
    )
    for _ in range(20):
        table, candid = follow(table, answers, table, places_of().double().numpy())
    np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)  # float16
    answers, rng = table, np.random.default_rng(0)
    for epoch in range(3):
        visits = [(index := torch.from_numpy(rng.integers(N, size=16)), answers_of(TRUTH[index], seed=i), unit(16, seed=i))
                  for i in range(10 * epoch, 10 * epoch + 6)]  # fmt: skip
        [labels.record(*visit) for visit in visits]
        labels.end_epoch()
        said, places = said_of(visits, CLASSES, 0), said_of(visits, 5, 1)
        seen = said.sum(1) > 0
        assert 20 < seen.sum() < N
        said, places = (x[seen] / np.linalg.norm(x[seen], how, 1, True) for x, how in ((said, 1), (places, 2)))
        table = table.copy()
        table[seen], candid = follow(table[seen], answers[seen], said, places)
        np.testing.assert_allclose(labels.targets(EVERY), table, atol=5e-3)
        assert labels.candour == pytest.approx(candid)


def test_candour():
    """It is 1 of a teacher who is right as often as it says, and of one who says less; the more it overstates, the less."""
    truth = torch.tensor([0] * 300 + [1] * 100 + [1] * 300 + [0] * 100)  # it says 3 / 4, and is right so often
    said = torch.tensor([[0.75, 0.25]] * 400 + [[0.25, 0.75]] * 400)
    near = F.one_hot(truth, 2).float()
    found = [candour(F.normalize(said**power, p=1, dim=1), near) for power in (0.5, 1, 1.1, 1.3, 3)]
    assert found[:2] == [1, 1] and found == sorted(found, reverse=True) and len(set(found)) == 4 and found[-1] < 0.1


def test_knows_nothing():
    """Neighbourhoods that say what all images say leave the teacher's labels as they are."""
    answers = answers_of()
    mass = answers.mean(0)
    torch.testing.assert_close(bayes_rule(answers, mass.expand(N, CLASSES), mass), answers)
    everyone = EnsembleLabels(answers, unit(), neighbours=N)
    assert torch.equal(everyone.table.argmax(1), answers.argmax(1))


def test_classes():
    """The classes' order does not matter, and a class that is split into two halves does not grow."""
    answers, places, other = answers_of(), places_of(), torch.tensor([2, 0, 3, 1])
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1])
    for there, here in ((None, None), (prior[other], prior)):
        moved = EnsembleLabels(answers[:, other], places, class_prior=there)
        table = EnsembleLabels(answers, places, class_prior=here).targets(EVERY)
        torch.testing.assert_close(moved.targets(EVERY), table[:, other], rtol=0, atol=2e-3)
    near, halves = (
        neighbour_mean(places, answers, 7),
        lambda x: torch.cat([x[..., :1] / 2, x[..., :1] / 2, x[..., 1:]], -1),
    )
    split = bayes_rule(*map(halves, (answers, near, answers.mean(0))))
    torch.testing.assert_close(split, halves(bayes_rule(answers, near, answers.mean(0))))


@pytest.mark.parametrize("prior", [None, (0.4, 0.3, 0.2, 0.1)])
@pytest.mark.parametrize("kind", ["soft", "hard", "ranked"])
def test_teachers(kind, prior):
    """Every kind of teacher, and a class of which it never speaks, gives labels on the simplex, though they are kept in
    float16; known shares are met."""
    answers = answers_of()
    order = answers.argsort(1, descending=True).argsort(1)
    answers = dict(soft=answers, hard=(order == 0).float(), ranked=1 / (1 + order) * (order < 2))[kind]
    answers = F.normalize(answers, p=1, dim=1)
    never = torch.cat([answers, torch.zeros(N, 1)], 1)
    for probs in (answers, never) if prior is None else (answers,):
        labels = EnsembleLabels(probs, places_of(), 0.99, 5, prior if prior is None else torch.tensor(prior))
        for _ in range(3):
            labels.record(EVERY, probs, unit())
            labels.end_epoch()
        targets = labels.targets(EVERY)
        assert targets.isfinite().all() and targets.min() >= 0 and 0 <= labels.candour <= 1
        torch.testing.assert_close(targets.sum(1), torch.ones(N), rtol=0, atol=1e-6)
        if prior:
            torch.testing.assert_close(targets.mean(0), torch.tensor(prior), rtol=0, atol=0.01)


def test_pool():
    """Beyond the pool all images take their neighbours from the same few random ones, and none is its own neighbour."""
    places = unit(40)
    means = neighbour_mean(places, torch.eye(40), 3, pool=10)  # row i: 1/3 at each neighbour of i
    members = means.sum(0).nonzero().flatten().tolist()
    assert len(members) <= 10 and members != list(range(len(members))) and (means.diag() == 0).all()
    assert ((means * 3).round() == means * 3).all() and torch.equal((means > 0).sum(1), torch.full((40,), 3))
    for i in set(range(40)) - set(members):
        nearest = sorted(members, key=lambda j, i=i: -(places[i] @ places[j]))[:3]
        assert means[i].nonzero().flatten().tolist() == sorted(nearest)


def test_state():
    """Labels that were saved go on as those that were not. At momentum 1 nothing is recorded and nothing changes. No
    graph of the student is kept, and the teacher's array stays as it was."""
    kept, labels, fixed = (
        answers_of(),
        EnsembleLabels(answers_of(), places_of()),
        EnsembleLabels(answers_of(), places_of(), 1),
    )
    teacher = fixed.table.clone()
    assert torch.equal(teacher, kept.half())
    for seed in (1, 2):
        resumed = EnsembleLabels(answers_of(seed=5), places_of(seed=5))
        resumed.load_state_dict(labels.state_dict())
        for each in (labels, resumed, fixed):
            each.record(EVERY, answers_of(seed=seed).requires_grad_(), places_of(seed=seed).requires_grad_())
            assert each is not fixed or (each.embeddings is None and each.predictions.count_nonzero() == 0)
            each.end_epoch()
        assert not labels.table.requires_grad and all(map(torch.equal, labels.buffers(), resumed.buffers()))
    assert torch.equal(fixed.table, teacher) and not torch.equal(labels.table, teacher)


def test_features_help():
    """In the teacher's features, before any training, a teacher that is mostly right becomes more often right."""
    truth = torch.arange(400) % CLASSES
    answers = answers_of(truth)
    right = [
        (probs.argmax(1) == truth).float().mean()
        for probs in (answers, EnsembleLabels(answers, places_of(truth)).table)
    ]
    assert 0.5 < right[0] < 0.8 and right[1] > right[0] + 0.15


@pytest.mark.parametrize("ratio", [1, 10])
@pytest.mark.parametrize("model", ["RN50", "ViT-B-32", "ViT-L-14"])
def test_real_features(model, ratio, reference):
    """OpenAI's CLIP on 19 classes of satellite images, equally large or up to 10:1: the labels are more often right than
    its zero-shot answers."""
    data = np.load(reference("whurs19_openai_clip_features.npz"))
    images, truth = F.normalize(torch.tensor(data[f"images_{model}"]).float(), dim=1), torch.tensor(data["labels"])
    texts = F.normalize(torch.tensor(data[f"texts_{model}"]).float(), dim=2)  # (107, 19, D)
    probs = zero_shot_probs(images, text_classifier(lambda of: texts[:, int(of[0])], list(map(str, range(19))), ["{}"]))
    gains = []
    for seed in range(3):
        generator, kept = torch.Generator().manual_seed(seed), []
        for place, c in enumerate(torch.randperm(19, generator=generator)):
            of_class = (truth == c).nonzero()[:, 0]
            few = torch.randperm(len(of_class), generator=generator)[: round(len(of_class) * ratio ** (-place / 18))]
            kept.append(of_class[few])
        kept = torch.cat(kept)
        labels = EnsembleLabels(probs[kept], images[kept])
        right = [(said.argmax(1) == truth[kept]).float().mean().item() for said in (probs[kept], labels.table)]
        gains.append(right[1] - right[0])
    assert min(gains) > 0 and np.mean(gains) > 0.03, gains
