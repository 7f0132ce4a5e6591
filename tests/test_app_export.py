"""A student taken elsewhere: ONNX Runtime and safetensors give what tclip gives; no code in a model.pt is run."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import Bomb

import tclip
from tclip_app.cli import main

CLASSES = ["red", "grün", "blue, dark"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model.pt of a student that has learned nothing, but whose statistics are no longer those of the start."""
    torch.manual_seed(0)
    student = tclip.Student("resnet8", 3, 16).train()
    student(torch.rand(64, 3, 16, 16))
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.save(dict(arch="resnet8", size=16, classes=CLASSES, student=student.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def onnx_file(model):
    """model.onnx, with model.safetensors beside it, written by the command line."""
    for package in ("onnxscript", "safetensors"):
        pytest.importorskip(package)
    main(["export", str(model)])
    assert {file.name for file in model.parent.iterdir()} == {"model.pt", "model.onnx", "model.safetensors"}
    return model.with_suffix(".onnx")


@pytest.mark.parametrize("n", [1, 3, 17])
def test_onnx(n, model, onnx_file):
    """ONNX Runtime gives tclip's own probabilities, from uint8 pixels, for a batch of any size, by the file alone."""
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    (given,), (returned,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [3, 16, 16])
    assert (returned.name, returned.type) == ("probs", "tensor(float)")
    pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    (probs,) = session.run(None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(probs, tclip.predict(tclip.load_student(model)[0], pixels), atol=1e-5)
    about = session.get_modelmeta().custom_metadata_map
    assert (json.loads(about["classes"]), about["arch"], about["size"]) == (CLASSES, "resnet8", "16")
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load(onnx_file), full_check=True)


def test_safetensors(model, onnx_file):
    """The weights come back to the bit, and with the metadata they are a student again."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = onnx_file.with_suffix(".safetensors")
    with safe_open(file, "pt") as content:
        about = content.metadata()
    again = tclip.Student(about["arch"], len(json.loads(about["classes"])), int(about["size"])).eval()
    again.load_state_dict(load_file(file))
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(tclip.predict(tclip.load_student(model)[0], pixels), tclip.predict(again, pixels))


def test_export_needs_its_packages(model, monkeypatch):
    """Without them: one line with the command that installs them."""
    monkeypatch.delitem(sys.modules, "tclip_app.export", raising=False)
    monkeypatch.delattr("tclip_app.export", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(tclip.UserError, match="onnxscript: pip install"):
        main(["export", str(model)])


@pytest.mark.parametrize("action", ["predict", "export"])
def test_models_from_elsewhere(action, model, tmp_path):
    """A model.pt that would run code is refused, and none of its code is run; so is what is no model, or cut off."""
    bomb, content, file = Bomb(tmp_path / "exploded"), torch.load(model, weights_only=True), tmp_path / "other.pt"
    arguments = [action, str(model), "--model", str(file)] if action == "predict" else [action, str(file)]

    def refused():
        with pytest.raises(tclip.UserError, match="other.pt"):
            main(arguments)
        assert os.listdir(tmp_path) in ([], ["other.pt"])

    refused()
    for hostile in (bomb, content | dict(classes=bomb), dict(content, extra=1), {}, [1], torch.zeros(2)):
        for zipped in (True, False):
            torch.save(hostile, file, _use_new_zipfile_serialization=zipped)
            refused()
    for share in (0, 0.01, 0.5, 0.99):
        file.write_bytes(model.read_bytes()[: int(share * model.stat().st_size)])
        refused()
