"""Students by the name of their network: resnets, and those of timm, from scratch or with their weights."""

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import coloured, rows_of
from PIL import Image

import tclip
from tclip_app.cli import main
from tclip_app.files import load_student
from tclip_app.networks import build


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("size", [16, 64, 96])
def test_timm_network(name, size):
    """Features are those of timm's network for the image, enlarged fourfold up to 64 px; they stay where torch changes
    its BatchNorms for several GPUs."""
    torch.manual_seed(0)
    student, x = build(f"timm:{name}", 3, size).eval(), torch.rand(2, 3, size, size)
    torch.manual_seed(0)
    side = 4 * size if size <= 64 else size
    network = timm.create_model(name, num_classes=0, **(dict(img_size=side) if name == "test_vit" else {})).eval()
    expected = network(F.interpolate(x, (side, side), mode="bilinear"))
    torch.testing.assert_close(student.backbone(x), expected)
    torch.testing.assert_close(torch.nn.SyncBatchNorm.convert_sync_batchnorm(student).backbone(x), expected)


def test_timm_run(tmp_path, monkeypatch):
    """tclip train, predict and export with a network of timm. --pretrained asks for its weights once: checkpoint.pt and
    model.pt are read without."""
    onnxruntime, asked, create = pytest.importorskip("onnxruntime"), [], timm.create_model
    pytest.importorskip("onnxscript")
    create_model = lambda name, pretrained, **how: asked.append(pretrained) or create(name, **how)  # noqa: E731
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    pixels, probs, _ = coloured(24, size=8)
    for i, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"photos/{i:02d}.png")
    said = [dict(file=f"{i:02d}.png", label="abc"[p.argmax()]) for i, p in enumerate(probs)]
    tclip.write_csv(tmp_path / "said.csv", said)
    how = "--pseudo-labels said.csv --size 8 --epochs 1 --batch-size 8 --out run --device cpu"
    main(["train", "photos", "--arch", "timm:test_efficientnet", "--pretrained", *how.split()])
    main(["predict", "photos", "--model", "run/model.pt", "--out", "more", "--device", "cpu"])
    main(["export", "run/model.pt"])
    main(["train", "--resume", "run"])
    assert asked == [True, False, False, False]
    labels, rows = rows_of("run/labels.csv"), rows_of("more/predictions.csv")
    assert [row["student_label"] for row in labels] == [row["label"] for row in rows]
    session = onnxruntime.InferenceSession("run/model.onnx", providers=["CPUExecutionProvider"])
    expected = tclip.predict(load_student("run/model.pt")[0], pixels)
    np.testing.assert_allclose(session.run(["probs"], {"pixels": pixels.numpy()})[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "arch, pretrained, word",
    [
        ("resnet88", False, "near: .*resnet8"), ("timm:hf-hub:a/b", False, "there is"),
        *((name, False, "near: timm:mobilenetv4_conv_small")
          for name in ("mobilenetv4_conv_small", "timm:mobilenetv4_con_small")),
        *((name, False, "takes no images of 16 px") for name in ("timm:efficientformer_l1", "timm:halonet_h1")),
        ("resnet18", True, "no weights of resnet18"),
        ("timm:test_resnet", True, "no download"), ("timm:darknet17", True, "no weights of timm:darknet17"),
    ],
)  # fmt: skip
def test_mistakes(arch, pretrained, word, monkeypatch):
    """Told in words; an unknown name gives the nearest ones, and nothing is fetched by one that timm does not list."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(tclip.UserError, match=f"(?s)^--(arch|pretrained).*{word}"):
        build(arch, 3, 16, pretrained)
