"""The student network, its predictions and their score."""

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix

from tclip import Student, predict, score


@pytest.mark.parametrize(
    "arch, size, share",
    [("resnet8", size, 1 + (size >= 32)) for size in (8, 16, 31, 32, 64)]
    + [("resnet18", size, 1 if size <= 64 else 4) for size in (32, 64, 65, 96)],
)
def test_stem(arch, size, share):
    """The first stage sees every pixel of small images: half of each side from 32 px on (resnet8), a quarter above 64
    px, by torchvision's stem (resnet18). The backbone is given 0 for mid-grey: the caller need not normalise.
    Embeddings have length one, where half precision is on, too."""
    student, seen = Student(arch, 10, size).eval(), []
    for stage in (student.backbone, student.backbone[3] if arch == "resnet8" else student.backbone.layer1):
        stage.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, z = student(torch.stack([torch.full((3, size, size), value) for value in (0.0, 0.5, 1.0)]))
    assert logits.shape == (3, 10) and z.shape == (3, 128) and z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    assert seen[0].unique().tolist() == [-2, 0, 2] and seen[1].shape[-1] == -(-size // share)


def test_predict():
    """It is a forward pass in eval mode, softmaxed, in batches of any size."""
    torch.manual_seed(0)
    student, pixels = Student("resnet8", 5, 256), torch.randint(0, 256, (19, 3, 256, 256), dtype=torch.uint8)
    student(torch.rand(16, 3, 16, 16))  # so that BatchNorm's statistics are no longer the initial ones
    probs = predict(student, pixels)  # in batches of 16 and 3
    with torch.no_grad():
        expected = student.eval()(pixels / 255)[0].softmax(1)
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
    nothing = score(probs, torch.full((60,), -1))  # None, not zero
    assert nothing["accuracy"] is None and nothing["per_class"] == [None] * 4 and nothing["confusion"].sum() == 0
