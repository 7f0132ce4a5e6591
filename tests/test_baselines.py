"""The baselines, against plain implementations of what is published; and the benchmark: resuming, tables, teachers."""

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import tclip
from tclip import Config, Images, UserError, complete

sys.path.insert(0, str(Path(tclip.__file__).resolve().parent / "tutorials"))
import baselines  # noqa: E402
import benchmark  # noqa: E402
from baselines import METHODS, STUDY  # noqa: E402

N, CLASSES = 64, 3


class Sealed(Images):
    """Images that fail the test when their truth is looked at."""

    @property
    def truth(self):
        raise AssertionError("truth was read")

    @truth.setter
    def truth(self, value):
        pass


def tiny(n=N, kind=Images):
    """Coloured noise: class c is brighter in channel c."""
    pixels = torch.randint(0, 160, (n, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    pixels[torch.arange(n), torch.arange(n) % CLASSES] += 80
    return kind(pixels.byte(), [str(i) for i in range(n)], ["red", "green", "blue"], torch.arange(n) % CLASSES)


def opinion(n=N):
    """The teacher's probabilities: mostly right, now and then wrong."""
    logits = torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(n), torch.arange(n) % CLASSES] += 2
    return logits.softmax(1)


def settings(**changes):
    values = dict(size=8, epochs=2, batch_size=16, label_neighbours=3, device="cpu")
    return complete(Config(**(values | changes)))


def random_logits(rows, classes=CLASSES, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)).mul(2)


def softmax(row):
    """In double precision, of a list."""
    powers = [math.exp(x) for x in row]
    return [power / sum(powers) for power in powers]


# ---- losses ----------------------------------------------------------------------------------------------------------

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.4, 0.3, 0.3], [0.1, 0.8, 0.1]])
LABELS = [0, 2, 1, 0, 1]
INDEX = torch.tensor([4, 1, 2])  # a batch of three images: rows 0..2 are their first views, 3..5 their second


def labels_of_rows():
    return [LABELS[i] for i in INDEX.tolist()] * 2


def test_gce():
    """Mean over the rows of (1 - p_y^q) / q; and q -> 0 is cross-entropy."""
    logits = random_logits(6)
    plain = [(1 - softmax(row)[y] ** 0.7) / 0.7 for row, y in zip(logits.tolist(), labels_of_rows())]
    assert baselines.GCE(PROBS, q=0.7)(logits, INDEX).item() == pytest.approx(np.mean(plain), rel=1e-5)
    expected = F.cross_entropy(logits, torch.tensor(labels_of_rows()))
    torch.testing.assert_close(baselines.GCE(PROBS, q=1e-3)(logits, INDEX), expected, rtol=0.01, atol=0)


def test_gce_gradient_at_zero():
    """A label that is as good as impossible gives a finite gradient."""
    logits = torch.tensor([[-200.0, 0.0, 0.0]] * 2, requires_grad=True)
    baselines.GCE(PROBS, q=0.7)(logits, torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


def test_sce():
    """alpha * -sum_k y_k log p_k + beta * -sum_k p_k log y_k, where the log of a zero of y is A."""
    logits, total = random_logits(6), 0.0
    for row, label in zip(logits.tolist(), labels_of_rows()):
        for k, p in enumerate(softmax(row)):
            total += 0.1 * -(k == label) * math.log(p) + 2.0 * -p * (0 if k == label else -4)
    loss = baselines.SCE(PROBS, alpha=0.1, beta=2.0, A=-4.0)(logits, INDEX)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def test_elr():
    """CE + lambda * log(1 - <p, t>), and t <- beta t + (1 - beta) p from zero, over three visits of some images."""
    loss, t = baselines.ELR(PROBS, beta=0.7, weight=3.0), [[0.0] * CLASSES for _ in PROBS]
    for visit, batch in enumerate(([4, 1, 2], [0, 4, 3], [4, 2, 1])):
        logits = random_logits(6, seed=visit)
        p = [softmax(row) for row in logits.tolist()]
        total = 0.0
        for row, i in enumerate(batch):  # its target first, which both views then meet
            t[i] = [0.7 * old + 0.3 * (a + b) / 2 for old, a, b in zip(t[i], p[row], p[row + 3])]
        for row, i in enumerate(batch * 2):
            total -= math.log(p[row][LABELS[i]])
            total += 3.0 * math.log(1 - sum(a * b for a, b in zip(p[row], t[i])))
        assert loss(logits, torch.tensor(batch)).item() == pytest.approx(total / 6, rel=1e-3)  # the clamp is 1e-4
        torch.testing.assert_close(loss.table, torch.tensor(t), rtol=0, atol=1e-3)


def test_elr_gradient():
    """No gradient flows into the target: it is that of the formula with t held fast."""
    loss, logits = baselines.ELR(PROBS, beta=0.7, weight=3.0), random_logits(6).requires_grad_()
    loss(logits, INDEX).backward()
    again = logits.detach().clone().requires_grad_()
    p, t = again.softmax(1), loss.table[INDEX].repeat(2, 1)
    assert not loss.table.requires_grad
    (F.cross_entropy(again, torch.tensor(labels_of_rows())) + 3 * (1 - (t * p).sum(1)).log().mean()).backward()
    torch.testing.assert_close(logits.grad, again.grad, rtol=1e-3, atol=1e-5)


def test_elr_certain():
    """An image that the student is certain of has a finite loss: p is kept off the ends."""
    loss, logits = baselines.ELR(PROBS, beta=0.0, weight=3.0), torch.tensor([[100.0, 0, 0]] * 2, requires_grad=True)
    value = loss(logits, torch.tensor([0]))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_labels():
    """What the methods make of the teacher's probabilities; smoothing is PyTorch's own."""
    assert torch.equal(baselines.soft(PROBS), PROBS)
    assert baselines.hard(PROBS).tolist() == [[float(k == label) for k in range(3)] for label in LABELS]
    logits = random_logits(5)
    expected = F.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, baselines.smoothed(PROBS)), expected)


# ---- the shared loop -------------------------------------------------------------------------------------------------


class CrossEntropy:
    def __init__(self, probs):
        self.labels = probs.argmax(1)

    def __call__(self, logits, index):
        return F.cross_entropy(logits, F.one_hot(self.labels[index].repeat(2), CLASSES).float())


def test_loop_is_that_of_tclip():
    """With cross-entropy for a loss the shared loop gives the student of tclip.train(), to the bit: the same network,
    augmentation, order of the images, learning rates, optimiser and precision."""
    images, config = tiny(37), settings(epochs=3, seed=5)
    student, _ = baselines.train_with_loss(config, images, opinion(37), CrossEntropy)
    expected, _ = METHODS["cross-entropy"].run(config, images, opinion(37))
    assert torch.equal(tclip.predict(student, images.pixels), tclip.predict(expected, images.pixels))


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.settings.get("label_momentum") == 1])
def test_labels_stay(monkeypatch, name):
    """Where labels are to stay, every epoch is trained on what the method makes of the teacher's."""
    seen, targets = [], tclip.EnsembleLabels.targets

    def spy(self, index):
        seen.append((index, targets(self, index)))
        return seen[-1][1]

    monkeypatch.setattr(tclip.EnsembleLabels, "targets", spy)
    _, labels = METHODS[name].run(settings(epochs=3), tiny(), opinion())
    assert labels is None and len(seen) == 3 * 4
    for index, given in seen:
        expected = METHODS[name].labels(opinion())
        if "class_prior" not in METHODS[name].settings:
            expected = tclip.balance(expected)
            torch.testing.assert_close(given, expected[index], rtol=0, atol=1e-3)  # kept in float16


def test_settings_are_the_papers():
    """The contrastive baselines are the two losses of tclip that its own tests prove to be SimCLR and SupCon."""
    for name, switches in {"SimCLR + CE": ("instance", "all"), "SupCon + CE": ("class", "all")}.items():
        method = METHODS[name]
        assert (method.settings["positives"], method.settings["negatives"]) == switches
        assert method.settings["c3l_weight"] == 1 and method.labels is baselines.hard
    assert METHODS["tclip"].settings == {} and METHODS["tclip"].train is tclip.train


# ---- Co-teaching -----------------------------------------------------------------------------------------------------


def test_exchange():
    """Each network learns from the images that are easy for the other, on losses made by hand."""
    first = torch.tensor([0.1, 0.2, 3.0, 4.0], requires_grad=True)  # finds images 0 and 1 easy
    second = torch.tensor([5.0, 0.3, 0.4, 6.0], requires_grad=True)  # finds images 1 and 2 easy
    for_first, for_second = baselines.exchange(first, second, 0.5)
    assert for_first.item() == pytest.approx((0.2 + 3.0) / 2) and for_second.item() == pytest.approx((5.0 + 0.3) / 2)
    (for_first + for_second).backward()
    assert first.grad.tolist() == [0, 0.5, 0.5, 0] and second.grad.tolist() == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("forget, kept", [(0.0, 4), (0.25, 3), (0.3, 2), (1.0, 1)])
def test_exchange_keeps(forget, kept):
    """How many are kept: all, the rest rounded down, and always one."""
    losses = torch.arange(4.0)
    assert baselines.exchange(losses, losses, forget)[0].item() == pytest.approx(losses[:kept].mean().item())


def test_co_teaching_forgets(monkeypatch):
    """The share forgotten grows in equal steps to the teacher's mean doubt, and losses are means of two views."""
    asked, exchange = [], baselines.exchange

    def spy(first, second, forget):
        asked.append(forget)
        assert first.shape == second.shape == (16,) and not torch.equal(first, second)
        return exchange(first, second, forget)

    monkeypatch.setattr(baselines, "exchange", spy)
    baselines.co_teaching(settings(epochs=4), tiny(), opinion(), forget_epochs=2)
    doubt = 1 - opinion().max(1).values.mean().item()
    assert asked[::4] == pytest.approx([0, doubt / 2, doubt, doubt])


def test_co_teaching_trains_both(monkeypatch):
    """One step moves both networks at the same learning rate."""
    made, new_student, rates = [], baselines.new_student, []

    def spy(*arguments):
        made.append(new_student(*arguments))
        return made[-1]

    def descend(optimizer, loss):
        rates.append([group["lr"] for group in optimizer.param_groups])
        loss.backward()
        optimizer.step()

    monkeypatch.setattr(baselines, "new_student", spy)
    monkeypatch.setattr(baselines, "descend", descend)
    torch.manual_seed(settings().seed)
    begin = [new_student(settings(), tiny())[0].classifier.weight.clone() for _ in range(2)]
    returned, _ = baselines.co_teaching(settings(epochs=1), tiny(), opinion(), forget_epochs=1)
    (first, _), (second, _) = made
    assert returned is first and all(len(set(rate)) == 1 and len(rate) == 2 for rate in rates)
    for network, weight in zip((first, second), begin):
        assert not torch.equal(network.classifier.weight, weight)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)


# ---- DivideMix -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_clean_probability():
    """On losses of two heaps the chance to be right tells them apart, whatever the scale, and whichever is larger."""
    generator = torch.Generator().manual_seed(0)
    for right in (30, 170):
        clean = torch.arange(200) < right
        losses = torch.where(clean, 0.2, 2.0) + 0.15 * torch.randn(200, generator=generator)
        for scale in (1, 100, 0.01):
            p = baselines.clean_probability(scale * losses)
            assert p.dtype == torch.float32 and torch.equal(p > 0.5, clean)
    assert baselines.clean_probability(torch.ones(20)).isfinite().all()


def test_label_loss():
    """Cross-entropy of each image with its label, of the student's predictions without augmentation."""
    student, labels = tclip.Student("resnet8", CLASSES, 8), opinion(9).argmax(1)
    expected = -tclip.predict(student, tiny(9).pixels).log()[torch.arange(9), labels]
    torch.testing.assert_close(baselines.label_loss(student, tiny(9).pixels, labels), expected)


def test_sharpen():
    p = opinion(5).double().numpy()
    expected = p**4 / (p**4).sum(1, keepdims=True)
    torch.testing.assert_close(baselines.sharpen(opinion(5), 0.25), torch.tensor(expected).float())


def test_co_refine_and_co_guess():
    """Against loops: the label by its chance, own predictions for the rest; and the mean of four predictions."""
    one_hot, clean = baselines.hard(PROBS), torch.tensor([0.9, 0.5, 1.0, 0.6, 0.7])
    p, other = random_logits(10).softmax(1), random_logits(10, seed=1).softmax(1)
    refined, guessed = baselines.co_refine(one_hot, clean, p), baselines.co_guess(p, other)
    for i in range(5):
        for c in range(CLASSES):
            own = (p[i, c] + p[i + 5, c]) / 2
            assert refined[i, c].item() == pytest.approx((clean[i] * one_hot[i, c] + (1 - clean[i]) * own).item())
            mean = (p[i, c] + p[i + 5, c] + other[i, c] + other[i + 5, c]) / 4
            assert guessed[i, c].item() == pytest.approx(mean.item())


def test_mixup():
    """Rows are mixed with others, images and labels alike, and each keeps at least half of itself."""
    torch.manual_seed(0)
    shares = []
    for _ in range(50):
        inputs, targets = baselines.mixup(torch.eye(6), 2 * torch.eye(6), alpha=0.5)
        torch.testing.assert_close(targets, 2 * inputs)
        torch.testing.assert_close(inputs.sum(1), torch.ones(6))
        assert inputs.diag().min() >= 0.5 and ((inputs > 0).sum(1) <= 2).all()
        shares.append(inputs.diag().min().item())
    assert max(shares) - min(shares) > 0.3  # drawn anew each time


def test_semi_supervised_loss():
    """Cross-entropy of the labeled, squared error of the others, the penalty for unequal classes: in loops."""
    logits, targets = random_logits(7), random_logits(7, seed=1).softmax(1)
    p, t = [softmax(row) for row in logits.tolist()], targets.tolist()
    cross_entropy = -sum(t[i][c] * math.log(p[i][c]) for i in range(4) for c in range(3)) / 4
    squared = sum((t[i][c] - p[i][c]) ** 2 for i in range(4, 7) for c in range(3)) / (3 * 3)
    mean = [sum(row[c] for row in p) / 7 for c in range(3)]
    penalty = sum(1 / 3 * math.log((1 / 3) / m) for m in mean)
    loss = baselines.semi_supervised_loss(logits, targets, 4, 25.0)
    assert loss.item() == pytest.approx(cross_entropy + 25 * squared + penalty, rel=1e-5)


def test_warm_up_epoch(monkeypatch):
    """Cross-entropy less the entropy of the predictions."""
    losses, logits = [], random_logits(2 * N)
    monkeypatch.setattr(baselines, "forward", lambda student, views: logits)
    monkeypatch.setattr(baselines, "descend", lambda optimizer, loss: losses.append(loss.item()))
    config, labels = settings(batch_size=N), torch.zeros(N, dtype=torch.int64)
    baselines.warm_up_epoch(config, *baselines.new_student(config, tiny()), tiny().pixels, labels, 0)
    p = np.array([softmax(row) for row in logits.tolist()])
    assert losses == pytest.approx([-np.log(p[:, 0]).mean() + (p * np.log(p)).sum(1).mean()], rel=1e-5)


def test_division_is_the_others(monkeypatch):
    """After the warm-up each network gets the division by the other's losses, both made before either is trained."""
    made, calls, new_student = [], [], baselines.new_student

    def spy(*arguments):
        made.append(new_student(*arguments))
        return made[-1]

    def label_loss(student, pixels, labels):
        calls.append("loss")
        return torch.full((N,), float([network for network, _ in made].index(student)))

    def divided_epoch(config, student, optimizer, other, pixels, labels, clean, epoch, divided_epochs, **settings):
        calls.append((student, optimizer, other, clean[0].item(), epoch, divided_epochs))

    monkeypatch.setattr(baselines, "new_student", spy)
    monkeypatch.setattr(baselines, "label_loss", label_loss)
    monkeypatch.setattr(baselines, "clean_probability", lambda losses: losses)
    monkeypatch.setattr(baselines, "divided_epoch", divided_epoch)
    monkeypatch.setattr(baselines, "warm_up_epoch", lambda *arguments: calls.append("warm-up"))
    both, _ = baselines.divide_mix(settings(epochs=3), tiny(), opinion(), warm_up=1)
    (first, of_first), (second, of_second) = made
    expected = ["warm-up"] * 2
    for epoch in (1, 2):
        expected += ["loss", "loss", (first, of_first, second, 1, epoch, epoch - 1)]
        expected += [(second, of_second, first, 0, epoch, epoch - 1)]
    assert calls == expected
    logits = [network.eval()(torch.ones(2, 3, 8, 8))[0] for network in (first, second)]
    torch.testing.assert_close(both.eval()(torch.ones(2, 3, 8, 8))[0], sum(logits) / 2)


def divided(monkeypatch, clean, divided_epochs=0, ramp=2):
    """One divided epoch on tiny images: what co_refine(), mixup() and the loss were given, and the two networks."""
    seen = dict(clean=[], weight=[], labeled=[], rows=[], sharp=[], targets=[])
    co_refine, loss, mixup = baselines.co_refine, baselines.semi_supervised_loss, baselines.mixup
    sharpen = baselines.sharpen

    def spy_refine(one_hot, chance, p):
        seen["clean"].append(chance)
        return co_refine(one_hot, chance, p)

    def spy_sharpen(p, temperature):
        seen["sharp"].append(sharpen(p, 0.5))
        return sharpen(p, temperature)

    def spy_mixup(inputs, targets, alpha):
        seen["targets"].append(targets)
        return mixup(inputs, targets, alpha)

    def spy_loss(logits, targets, labeled, weight):
        seen["weight"].append(weight), seen["labeled"].append(labeled), seen["rows"].append(len(logits))
        return loss(logits, targets, labeled, weight)

    monkeypatch.setattr(baselines, "co_refine", spy_refine)
    monkeypatch.setattr(baselines, "sharpen", spy_sharpen)
    monkeypatch.setattr(baselines, "mixup", spy_mixup)
    monkeypatch.setattr(baselines, "semi_supervised_loss", spy_loss)
    config, labels = settings(), opinion().argmax(1)
    (student, optimizer), (other, _) = baselines.new_student(config, tiny()), baselines.new_student(config, tiny())
    begin = [network.classifier.weight.clone() for network in (student.eval(), other)]  # as label_loss() leaves them
    own = dict(threshold=0.5, temperature=0.5, alpha=4.0, unlabeled_weight=25.0, ramp=ramp)
    baselines.divided_epoch(config, student, optimizer, other, tiny().pixels, labels, clean, 1, divided_epochs, **own)
    moved = [not torch.equal(network.classifier.weight, w) for network, w in zip((student, other), begin)]
    assert student.training and not (other.training and seen["rows"])
    return seen, moved


def test_divided_epoch(monkeypatch):
    """A pass over the believed images alone, as many others beside each batch; one network moves; targets sharpened."""
    clean = torch.linspace(0, 1, N)
    seen, moved = divided(monkeypatch, clean)
    assert torch.cat(seen["clean"]).sort().values.tolist() == clean[clean > 0.5].tolist()
    assert seen["labeled"] == [32, 32] and seen["rows"] == [64, 64]  # two views of 16 believed and of 16 others
    assert moved == [True, False]
    for targets, sharp in zip(seen["targets"], seen["sharp"], strict=True):
        assert torch.equal(targets, sharp)
        torch.testing.assert_close(targets.sum(1), torch.ones(64))
        first, second = targets[:32].chunk(2)
        assert torch.equal(first, second)


@pytest.mark.parametrize("divided_epochs, weights", [(0, [0, 6.25]), (1, [12.5, 18.75]), (2, [25, 25])])
def test_ramp(monkeypatch, divided_epochs, weights):
    """The weight of the unlabeled loss grows with every step to its full size, and then stays."""
    assert divided(monkeypatch, torch.linspace(0, 1, N), divided_epochs)[0]["weight"] == pytest.approx(weights)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_nothing_to_divide(monkeypatch, chance):
    """Where all or none of the labels are believed, the network goes on as in the warm-up."""
    seen, moved = divided(monkeypatch, torch.full((N,), chance))
    assert seen["weight"] == [] and moved == [True, False]


def test_forever():
    """Every member comes once before any comes again."""
    members = torch.tensor([3, 5, 7, 11, 13])
    stream = baselines.forever(members, 2)
    for _ in range(3):
        assert sorted(torch.cat([next(stream) for _ in range(3)]).tolist()) == members.tolist()


# ---- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    """Two epochs give finite predictions, the same again for the same seed, other ones for another; truth is not
    touched, and labels come back where the method makes some."""
    method = METHODS[name]
    if name == "DivideMix":
        method = replace(method, own=method.own | dict(warm_up=1))
    probs = []
    for seed in (3, 3, 4):
        student, labels = method.run(settings(seed=seed), tiny(kind=Sealed), opinion())
        probs.append(tclip.predict(student, tiny().pixels))
    assert probs[0].shape == (N, CLASSES) and probs[0].isfinite().all()
    assert torch.equal(probs[0], probs[1]) and not torch.equal(probs[0], probs[2])
    assert (labels is not None) == (name in ("ELR", "tclip", "tclip without C3L"))
    assert labels is None or labels.shape == (N, CLASSES)


# ---- benchmark: runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def task():
    return benchmark.Task(tiny(), tiny(20), opinion(), opinion(20), "somebody")


@pytest.fixture
def quick(monkeypatch):
    """Runs that take no time: a list of those done, in order, and a student right by seed and method."""
    done = []

    def train(config, images, probs, **own):
        done.append(config.seed)
        student = tclip.Student("resnet8", len(images.classes), config.size)
        return student, None

    monkeypatch.setattr(benchmark, "ALL_METHODS", {name: replace(METHODS[name], train=train) for name in METHODS})
    return done


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_resume(tmp_path, monkeypatch, task, quick):
    """Interrupted after two runs, the benchmark does the others and no run twice; seeds are the outer loop."""
    path, methods, one_run = tmp_path / "new" / "digits.csv", ["GCE", "SCE", "tclip"], benchmark.one_run

    def interrupted(*arguments):
        if len(quick) == 2:
            raise KeyboardInterrupt
        return one_run(*arguments)

    monkeypatch.setattr(benchmark, "one_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.benchmark(path, settings(), task, methods, 2)
    assert [(row["method"], row["seed"]) for row in rows_of(path)] == [("GCE", "0"), ("SCE", "0")]
    before = rows_of(path)

    monkeypatch.setattr(benchmark, "one_run", one_run)
    benchmark.benchmark(path, settings(), task, methods, 2)
    expected = [(name, str(seed)) for seed in range(2) for name in methods]
    assert [(row["method"], row["seed"]) for row in rows_of(path)] == expected
    assert rows_of(path)[:2] == before and quick == [0, 0, 0, 1, 1, 1]
    benchmark.benchmark(path, settings(), task, methods, 2)
    assert len(quick) == 6
    assert [file.name for file in path.parent.iterdir()] == ["digits.csv"]


def changed_teacher(task):
    probs = task.probs.clone()
    probs[0] = probs[0].roll(1)
    return replace(task, probs=probs)


STALE = {
    "epochs": lambda config, task: (replace(config, epochs=3), task),
    "views": lambda config, task: (replace(config, views="photo"), task),
    "images": lambda config, task: (
        config,
        replace(task, images=benchmark.subset(task.images, torch.arange(9)), probs=task.probs[:9]),
    ),
    "teacher": lambda config, task: (config, changed_teacher(task)),
}


@pytest.mark.parametrize("change", STALE.values(), ids=STALE.keys())
def test_stale(tmp_path, task, quick, change):
    """Rows of other settings stay in the file, and out of the result: the runs are done anew."""
    path = tmp_path / "digits.csv"
    benchmark.benchmark(path, settings(), task, ["GCE", "tclip"], 1)
    benchmark.benchmark(path, *change(settings(), task), ["GCE", "tclip"], 1)
    old, new = rows_of(path)[:2], rows_of(path)[2:]
    assert len(quick) == 4 and not {row["digest"] for row in old} & {row["digest"] for row in new}
    for rows, present in ((old, [settings(), task]), (new, change(settings(), task))):
        assert list(benchmark.finished(path, *present, ["tclip", "GCE"]).values()) == rows[::-1]
        assert list(benchmark.finished(path, *present, ["GCE"])) == [("GCE", 0)]
    benchmark.benchmark(path, settings(), task, ["GCE", "tclip"], 1)
    assert len(quick) == 4


def test_settings_that_do_not_matter(tmp_path, task):
    """A setting of tclip makes rows stale of the methods that read it; the device and the seed make none so."""
    of = benchmark.settings_of
    for changed in (settings(device="auto"), settings(seed=9), settings(root="elsewhere")):
        assert of("tclip", settings(), task) == of("tclip", changed, task)
    changed = settings(label_sharpness=3.0)
    assert of("GCE", settings(), task) == of("GCE", changed, task)
    assert of("tclip", settings(), task) != of("tclip", changed, task)
    assert len({of(name, settings(), task) for name in METHODS}) == len(METHODS)
    assert json.loads(of("GCE", settings(), task))["q"] == 0.7


def test_row(monkeypatch, task):
    """What a row says, counted by hand: a student that calls everything green, labels that are right on two thirds."""

    class Green(torch.nn.Linear):
        def forward(self, x):
            return torch.tensor([[0.0, 5.0, 0.0]]).expand(len(x), 3), None

    labels = F.one_hot(torch.arange(N) % CLASSES % 2, CLASSES)  # blue is called red
    method = baselines.Method(
        "test", train=lambda config, images, probs: (Green(1, 1), type("", (), dict(table=labels)))
    )
    monkeypatch.setitem(benchmark.ALL_METHODS, "green", method)
    row = benchmark.one_run("green", settings(seed=7), task)
    truth = np.arange(N) % CLASSES
    said = opinion().argmax(1).numpy()
    assert row["transductive"] == np.mean(truth == 1) and row["inductive"] == np.mean(truth[:20] == 1)
    assert row["worst_class"] == 0 and row["label_accuracy"] == np.mean(truth != 2)
    assert row["teacher_transductive"] == np.mean(said == truth)
    assert row["teacher_inductive"] == np.mean(opinion(20).argmax(1).numpy() == truth[:20])
    assert row["teacher_worst_class"] == min(np.mean(said[truth == c] == c) for c in range(CLASSES))
    assert (row["suite"], row["method"], row["seed"], row["device"]) == ("digits", "green", 7, "cpu")
    assert row["torch"] == torch.__version__ and row["seconds"] >= 0
    assert benchmark.one_run("green", settings(), replace(task, heldout_probs=None))["teacher_inductive"] == ""


def test_student_that_blew_up(monkeypatch, task):
    """Predictions that are not numbers are an error that names the run, and no row."""
    student = tclip.Student("resnet8", CLASSES, 8)
    torch.nn.init.constant_(student.classifier.weight, math.nan)
    method = baselines.Method("test", train=lambda *_: (student, None))
    monkeypatch.setitem(benchmark.ALL_METHODS, "broken", method)
    with pytest.raises(UserError, match="broken, seed 0"):
        benchmark.one_run("broken", settings(), task)


# ---- benchmark: table and command line -------------------------------------------------------------------------------


def made_up_rows():
    generator = np.random.default_rng(0)
    teacher = dict(teacher="somebody", teacher_transductive="0.7", teacher_inductive="", teacher_worst_class="0.125")
    for seed in range(3):
        for name in ("ours", "theirs"):
            values = [str(value) for value in generator.uniform(0.2, 0.9, 4)]
            figures = dict(zip(("transductive", "inductive", "worst_class", "label_accuracy"), values))
            figures["label_accuracy"] = figures["label_accuracy"] if name == "ours" else ""
            yield dict(method=name, seed=str(seed), seconds=str(10.0 + seed), **figures) | teacher


def test_table():
    """Means and sample standard deviations are numpy's; the teacher comes first; what is not known is left empty."""
    rows = list(made_up_rows())
    teacher, *lines = benchmark.summarise(rows)
    assert teacher["name"] == "teacher: somebody" and teacher["held out"] is None and teacher["labels"] is None
    assert teacher["unlabeled"] == (0.7, 0.0) and teacher["worst class"] == (0.125, 0.0)
    assert [(line["name"], line["seeds"], line["seconds"]) for line in lines] == [("ours", 3, 11), ("theirs", 3, 11)]
    for line in lines:
        for column, field in benchmark.COLUMNS.items():
            values = [float(row[field]) for row in rows if row["method"] == line["name"] and row[field]]
            expected = (np.mean(values), np.std(values, ddof=1)) if values else None
            assert line[column] == (expected if expected is None else pytest.approx(expected))
    head, rule, first, ours, theirs = benchmark.table([teacher, *lines]).splitlines()
    mean, sd = lines[0]["unlabeled"]
    assert f"| {100 * mean:.1f} ± {100 * sd:.1f} |" in ours and "| 70.0 " in first and "±" not in first
    assert len({len(line) for line in (head, rule, first, ours, theirs)}) == 1
    one = benchmark.table(benchmark.summarise(rows[:2]))
    assert "±" not in one and len(one.splitlines()) == 5


def test_command(tmp_path, monkeypatch, capsys, task):
    """The command, called twice: the second time nothing is trained; table and picture are of all rows."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "load_task", lambda *arguments: task)
    monkeypatch.setitem(benchmark.SMALL, "digits", (dict(size=8, epochs=1, device="cpu"), None))
    arguments = ["--suite", "digits", "--seeds", "2", "--methods", "GCE,cross-entropy"]
    assert benchmark.main(arguments) == 0
    first = capsys.readouterr().out
    assert "| teacher: somebody" in first and "| cross-entropy" in first and "±" in first
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    monkeypatch.setattr(benchmark, "one_run", lambda *_: pytest.fail("trained again"))
    assert benchmark.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [line for line in first.splitlines() if line.startswith("|")]
    assert {file.name for file in tmp_path.iterdir()} == {"digits.csv", "digits.png"}


def test_study(tmp_path, monkeypatch, capsys, task):
    """Each entry of the study is tclip with one or two settings changed to values it may take; no two are equal; the
    command keeps their rows beside those of the methods."""
    defaults = settings()
    for name, method in STUDY.items():
        changed = {field: value for field, value in method.settings.items() if getattr(defaults, field) != value}
        assert changed or name in ("tclip", "hard labels at the start", "class prior none"), name
        assert method.train is tclip.train and isinstance(replace(defaults, **method.settings), Config)
    assert len({benchmark.settings_of(name, settings(class_prior="uniform"), task) for name in STUDY}) == len(STUDY)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "load_task", lambda *arguments: task)
    monkeypatch.setitem(benchmark.SMALL, "digits", (dict(size=8, epochs=1, device="cpu"), None))
    chosen = "tclip,positives class + negatives all"
    assert benchmark.main(["--study", "--seeds", "1", "--methods", chosen]) == 0
    assert "| positives class + negatives all |" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"digits-study.csv", "digits-study.png"}


@pytest.mark.parametrize("full", [False, True])
def test_part_of_a_suite(tmp_path, monkeypatch, task, full):
    """--images, --epochs and --teacher count, whatever the suite has, and the results get files of their own."""
    asked = []
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "load_task", lambda config, *rest: asked.append((*rest, config.epochs)) or task)

    def one_run(name, config, task):
        return next(made_up_rows()) | dict(
            method=name, seed=0, transductive=0.5, inductive=0.5, seconds=1.0,
            digest=benchmark.digest_of(benchmark.settings_of(name, config, task)),
        )  # fmt: skip

    monkeypatch.setattr(benchmark, "one_run", one_run)
    monkeypatch.setitem(benchmark.SMALL, "digits", (dict(size=8), 99))
    arguments = ["--seeds", "1", "--methods", "GCE", "--images", "7", "--teacher", "truth", "--epochs", "2"]
    assert benchmark.main(arguments + ["--full"] * full) == 0
    assert asked == [("truth", 7, 2)]
    assert {file.stem for file in tmp_path.iterdir()} == {"digits-truth-7-2-epochs"}


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--methods", "GCE,SC"], "SCE"),
        (["--methods", "GCE", "--study"], "tclip"),
        (["--seeds", "0"], "--seeds"),
        (["--images", "0"], "--images"),
        (["--epochs", "0"], "--epochs"),
        (["--teacher", "simulated"], "eurosat"),
    ],
)
def test_mistakes(monkeypatch, capsys, tmp_path, arguments, word):
    """One line that names the remedy, and nothing is trained."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "one_run", lambda *_: pytest.fail("trained"))
    assert benchmark.main(arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("benchmark: ") and word in error
    assert not list(tmp_path.iterdir())


# ---- benchmark: teachers ---------------------------------------------------------------------------------------------


def test_digits_task():
    """The digits with the offline CLIP: 1437 and 360 images, and answers that fit them."""
    task = benchmark.load_task(complete(Config("digits", device="cpu")), count=100)
    assert len(task.images.pixels) == len(task.probs) == 100 and len(task.heldout.pixels) == 360
    for part, probs in ((task.images, task.probs), (task.heldout, task.heldout_probs)):
        torch.testing.assert_close(probs.sum(1), torch.ones(len(probs)))
        assert 0.65 < tclip.score(probs, part.truth)["accuracy"] < 0.9


@pytest.fixture
def cifar10(tmp_path):
    """A CIFAR-10 of 20 unlabeled and 10 held-out grey images, the brightness of which is 10 x their class."""
    folder, names = tmp_path / "cifar10", ["airplane", "cat", "dog"]
    (folder / "unlabeled").mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(names) + "\n")
    rows = [dict(file=f"{i:05d}.jpg", label=names[i % 3]) for i in range(20)]
    for row in rows:
        Image.new("L", (32, 32), 10 * names.index(row["label"])).save(folder / "unlabeled" / row["file"])
    for i, name in enumerate(names):
        (folder / "test" / name).mkdir(parents=True)
        Image.new("L", (32, 32), 10 * i).save(folder / "test" / name / "0.jpg")
    tclip.write_csv(folder / "truth.csv", rows)
    files = np.array([row["file"] for row in reversed(rows)])  # not in the order of truth.csv
    probs = np.stack([np.eye(3)[int(file[:5]) % 3] for file in files]).astype("float16")
    np.savez(tmp_path / "cifar10_annotator.npz", files=files, classes=np.array(names), probs=probs)
    return tmp_path


def test_cifar10_task(cifar10):
    """Images, truth and the annotator's answers are of the same files, also in a part of them."""
    config = complete(Config("cifar10", root=str(cifar10), size=16, device="cpu"))
    for count in (None, 8):
        task = benchmark.load_task(config, count=count)
        assert task.images.pixels.shape == (count or 20, 3, 16, 16) and task.probs.dtype == torch.float32
        brightness = (task.images.pixels.float().mean((1, 2, 3)) / 10).round().long()
        assert torch.equal(brightness, task.images.truth) and torch.equal(task.probs.argmax(1), task.images.truth)
        assert [int(name[:5]) % 3 for name in task.images.names] == task.images.truth.tolist()
        assert task.heldout.truth.tolist() == [0, 1, 2] and task.heldout_probs is None
        assert "no CLIP" in task.teacher


def test_cifar10_mistakes(cifar10):
    """Files that are missing, and classes that are others, are told."""
    config = complete(Config("cifar10", root=str(cifar10), device="cpu"))
    (cifar10 / "cifar10" / "unlabeled" / "00003.jpg").unlink()
    with pytest.raises(UserError, match="00003.jpg"):
        benchmark.load_task(config)
    (cifar10 / "cifar10" / "classes.txt").write_text("airplane dog cat")
    with pytest.raises(UserError, match="classes"):
        benchmark.load_task(config)
    (cifar10 / "cifar10_annotator.npz").write_bytes(b"half")
    with pytest.raises(UserError, match="cifar10_annotator.npz"):
        benchmark.load_task(config)


@pytest.mark.parametrize("dataset, teacher", [("cifar10", None), ("eurosat", "clip"), ("digits", None)])
def test_clip_is_asked(tmp_path, monkeypatch, task, dataset, teacher):
    """CLIP is the teacher where there is no annotator's file, and where it is asked for."""
    monkeypatch.setattr(benchmark, "named_by_clip", lambda config, count: replace(task, teacher=config.clip))
    config = complete(Config(dataset, root=str(tmp_path)))
    assert benchmark.load_task(config, teacher, 3).teacher == tclip.DATASETS[dataset].clip


def test_truth_as_teacher(cifar10):
    """Where it is asked for, the truth is the teacher, of the very images that another would name."""
    config = complete(Config("cifar10", root=str(cifar10), size=16, device="cpu"))
    task, usual = benchmark.load_task(config, "truth", 8), benchmark.load_task(config, count=8)
    assert torch.equal(task.images.pixels, usual.images.pixels) and task.images.names == usual.images.names
    assert task.probs.tolist() == np.eye(3)[usual.images.truth].tolist() and task.heldout_probs is None
    assert "truth" in task.teacher


def test_mnist_without_its_margin(monkeypatch):
    """Of MNIST, the offline CLIP and the student see the middle 20 x 20 pixels; the choice repeats."""
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 256, (30, 28, 28), dtype="uint8")
    digits = [(Image.fromarray(array), i % 10) for i, array in enumerate(arrays)]
    classes = [str(i) for i in range(10)]
    monkeypatch.setattr(tclip, "open_dataset", lambda dataset, root, split="train": (digits, classes))
    config = complete(Config("mnist", size=20, arch="resnet8", clip="offline"))
    task, again = (benchmark.load_task(config, count=12) for _ in range(2))
    middles = torch.from_numpy(arrays[:, 4:24, 4:24])
    taken = [next(i for i, m in enumerate(middles) if torch.equal(m, image[0])) for image in task.images.pixels]
    assert len(set(taken)) == 12 and taken == sorted(taken) and taken != list(range(12))
    assert [i % 10 for i in taken] == task.images.truth.tolist()
    assert torch.equal(task.images.pixels, again.images.pixels) and torch.equal(task.probs, again.probs)
    assert torch.equal(task.heldout.pixels[:, 0], middles)  # all of them
    teacher = tclip.load_clip("offline")
    views = torch.stack([teacher.prepare(Image.fromarray(np.ascontiguousarray(m.numpy()))) for m in middles])
    prompts = tclip.text_classifier(teacher, classes, tclip.DATASETS["mnist"].templates)
    expected = tclip.zero_shot_probs(teacher.encode_images(views), prompts)
    assert torch.allclose(task.heldout_probs, expected, atol=1e-5)


EUROSAT_FOLDERS = (
    "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake".split()
)


@pytest.fixture
def eurosat(tmp_path, monkeypatch):
    """A EuroSAT of 12 images a class, each class of one colour, and an annotator that learns it in few steps."""
    generator = np.random.default_rng(0)
    for i, name in enumerate(EUROSAT_FOLDERS):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for k in range(12):
            colour = np.array([25 * i, 250 - 25 * i, 120 * (i % 3)]) + generator.integers(0, 6, (16, 16, 3))
            Image.fromarray(colour.clip(0, 255).astype("uint8")).save(folder / f"{name}_{k}.jpg")
    config = dict(size=8, arch="resnet8", epochs=12, batch_size=16)
    monkeypatch.setattr(benchmark, "ANNOTATOR", dict(config=config, labeled=40, calibration=10, bent=benchmark.BENT))
    return tmp_path


def test_eurosat_task(eurosat, monkeypatch):
    """The annotator is made once; it answers for images that it did not learn from, and they are the student's."""
    learned, batches = set(), baselines.batches

    def spy(*arguments):
        for index in batches(*arguments):
            learned.update(index.tolist())
            yield index

    monkeypatch.setattr(baselines, "batches", spy)
    config = complete(Config("eurosat", root=str(eurosat), size=8, device="cpu"))
    task = benchmark.load_task(config)
    whole = tclip.load_images("eurosat", str(eurosat), "train", 8)
    assert len(whole.pixels) == 96 and len(learned) == 30
    (path,) = eurosat.glob("eurosat_annotator_*.npz")
    rows = benchmark.read_arrays(path)["rows"]
    assert len(rows) == 56 and not learned & set(rows.tolist())
    assert torch.equal(task.images.pixels, whole.pixels[rows]) and torch.equal(task.images.truth, whole.truth[rows])
    assert task.probs.shape == (56, 10) and task.heldout_probs.shape == (24, 10) and "simulated" in task.teacher
    accuracy = tclip.score(task.probs, task.images.truth)["accuracy"]
    assert 0.3 < accuracy < 1  # above chance: the answers are in the order of the images

    made = benchmark.simulated_annotator(str(eurosat))
    assert np.array_equal(made["unlabeled"], task.probs.numpy())  # it repeats
    monkeypatch.setattr(benchmark, "simulated_annotator", lambda *_: pytest.fail("trained again"))
    part = benchmark.load_task(config, count=10)
    assert [part.images.names.index(name) for name in part.images.names] == list(range(10))
    at = [task.images.names.index(name) for name in part.images.names]
    assert torch.equal(part.probs, task.probs[at]) and torch.equal(part.images.pixels, task.images.pixels[at])


def test_bend():
    """(1 - b) P + b partner, made unit again: in numpy."""
    prototypes, names = F.normalize(random_logits(3, 4), dim=1), ["a", "b", "c"]
    bent = dict(a=("c", 0.25), b=("a", 0.0), c=("b", 0.75))
    p = prototypes.double().numpy()
    mixed = np.stack([0.75 * p[0] + 0.25 * p[2], p[1], 0.25 * p[2] + 0.75 * p[1]])
    expected = torch.tensor(mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).float()
    torch.testing.assert_close(benchmark.bend(prototypes, names, bent), expected)
    assert set(benchmark.BENT) == set(tclip.DATASETS["eurosat"].classes)
    assert all(partner in benchmark.BENT and partner != name for name, (partner, _) in benchmark.BENT.items())


def test_calibrated_temperature():
    """At it the mean confidence is the accuracy."""
    scores, truth = random_logits(300, 5) / 10, torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(3))
    truth[:150] = scores[:150].argmax(1)
    temperature = benchmark.calibrated_temperature(scores, truth)
    confidence = (scores / temperature).softmax(1).amax(1).mean().item()
    assert confidence == pytest.approx(tclip.score(scores, truth)["accuracy"], abs=1e-3)
