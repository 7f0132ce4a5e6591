"""The student network, its predictions and their score."""

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from torch import nn

from tclip import Student, UserError, predict, score

ARCHS = ["resnet8", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@pytest.mark.parametrize("arch", ARCHS)
def test_shapes(arch):
    """Logits for each class, and embeddings of length one, from every network that may be asked for."""
    student = Student(arch, 7, embedding_dim=24).eval()
    with torch.inference_mode():
        logits, z = student(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, 7) and z.shape == (2, 24)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(2))


def test_size_of_resnet8():
    """resnet8 has the 0.3 million parameters that its docstring promises, in three blocks of 32, 64, 128 channels."""
    student = Student("resnet8", 10)
    assert "0.3 M" in Student.__doc__ and round(sum(p.numel() for p in student.parameters()) / 1e6, 1) == 0.3
    blocks = [module for module in student.modules() if type(module).__name__ == "BasicBlock"]
    assert [block.conv2.out_channels for block in blocks] == [32, 64, 128]


def side_of_first_stage(student, stage, size):
    """How large what the first stage is given is, for an image of `size` pixels a side."""
    seen = []
    stage.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    assert student(torch.rand(2, 3, size, size))[0].shape == (2, 10)
    return seen[0]


@pytest.mark.parametrize("size, share", [(8, 1), (16, 1), (31, 1), (32, 2), (33, 2), (64, 2)])
def test_stem_of_resnet8(size, share):
    """The first block sees every pixel of small images, and half of each side from 32 px on."""
    student = Student("resnet8", 10, size).eval()
    assert side_of_first_stage(student, student.backbone[3], size) == size // share


@pytest.mark.parametrize("size, share", [(32, 1), (64, 1), (65, 4), (96, 4)])
def test_stem(size, share):
    """Up to 64 px the first stage sees every pixel; above, torchvision's stem leaves a quarter of each side."""
    student = Student("resnet18", 10, size).eval()
    assert side_of_first_stage(student, student.backbone.layer1, size) == -(-size // share)
    assert isinstance(student.backbone.fc, nn.Identity)


def test_normalisation_is_inside():
    """The backbone is given 0 for mid-grey, so the caller need not normalise."""
    student, seen = Student("resnet8", 3).eval(), []
    student.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(torch.stack([torch.full((3, 16, 16), value) for value in (0.0, 0.5, 1.0)]))
    assert [x.unique().tolist() for x in seen[0]] == [[-2], [0], [2]]


def test_unknown_arch():
    """The error names the nearest that there are."""
    with pytest.raises(UserError, match=r"'resnet81'.*resnet8\b"):
        Student("resnet81", 10)
    with pytest.raises(UserError, match="resnet8"):
        Student("vit_b_16", 10)


def warmed_up(classes=5):
    """A student whose BatchNorm statistics are no longer the initial ones, left in training mode."""
    torch.manual_seed(0)
    student = Student("resnet8", classes)
    for _ in range(3):
        student(torch.rand(16, 3, 16, 16))
    return student


def test_predict():
    """predict() is a forward pass in eval mode, softmaxed, whatever the size of its batches."""
    student, pixels = warmed_up(), torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8)
    statistics = student.backbone[1].running_mean.clone()
    results = [predict(student, pixels, batch_area) for batch_area in (1, 3 * 16 * 16, 11 * 16 * 16, 2**20)]
    assert torch.equal(student.backbone[1].running_mean, statistics)  # nothing is learned from what is predicted
    student.eval()
    with torch.no_grad():
        expected = student(pixels / 255)[0].softmax(1)
    for probs in results:
        assert probs.dtype == torch.float32 and not probs.requires_grad
        torch.testing.assert_close(probs, expected, rtol=0, atol=1e-5)


def test_score():
    """Accuracy, per-class accuracy and confusion matrix are scikit-learn's; rows of unknown truth do not count."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(60, 4, generator=generator).softmax(1)
    truth = torch.randint(-1, 3, (60,), generator=generator)  # -1 is unknown, and class 3 does not occur
    known, said = truth >= 0, probs.argmax(1)
    result = score(probs, truth)
    expected = confusion_matrix(truth[known], said[known], labels=range(4))
    assert result["confusion"].tolist() == expected.tolist()
    assert result["accuracy"] == pytest.approx(accuracy_score(truth[known], said[known]))
    assert result["per_class"][:3] == pytest.approx([expected[c, c] / expected[c].sum() for c in range(3)])
    assert result["per_class"][3] is None


@pytest.mark.parametrize("truth", [None, torch.full((6,), -1)])
def test_score_without_truth(truth):
    """Without truth there is nothing to count, which is None and not zero."""
    result = score(torch.rand(6, 3).softmax(1), truth)
    assert result["accuracy"] is None and result["per_class"] == [None] * 3
    assert result["confusion"].tolist() == [[0] * 3] * 3
