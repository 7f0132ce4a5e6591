"""A student taken elsewhere: ONNX Runtime and safetensors give what tclip gives; no code in a model.pt is run."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import Bomb

import tclip
from tclip_app.cli import main
from tclip_app.familiarity import Familiarity, load_familiarity, predict
from tclip_app.files import load_student

CLASSES = ["red", "grün", "blue, dark"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model.pt of a student that has learned nothing, but whose statistics are no longer those of the start."""
    torch.manual_seed(0)
    student = tclip.Student("resnet8", 3, 16).train()
    student(torch.rand(64, 3, 16, 16))
    path, typical = tmp_path_factory.mktemp("model") / "model.pt", Familiarity(3, 128)
    _, features = predict(student, torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8))
    typical.fit(features, torch.arange(64) % 3)
    content = dict(arch="resnet8", size=16, classes=CLASSES, student=student.state_dict())
    torch.save(content | dict(familiarity=typical.state_dict()), path)
    return path


@pytest.mark.parametrize("familiar", [True, False])
def test_export(model, familiar, tmp_path):
    """ONNX Runtime gives tclip's own probabilities, from uint8 pixels, for a batch of any size, by the file alone, and
    how familiar images are where model.pt holds that; with the metadata of the safetensors file its weights are the
    same student again, to the bit."""
    onnx, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxruntime"))
    safetensors = pytest.importorskip("safetensors.torch")
    pytest.importorskip("onnxscript")
    content = torch.load(model, weights_only=True)
    model = tmp_path / "model.pt"
    torch.save({key: value for key, value in content.items() if familiar or key != "familiarity"}, model)
    main(["export", str(model)])
    assert {file.name for file in model.parent.iterdir()} == {"model.pt", "model.onnx", "model.safetensors"}
    file, student = model.with_suffix(".onnx"), load_student(model)[0]
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,), (returned, *others) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [3, 16, 16])
    assert (returned.name, returned.type) == ("probs", "tensor(float)")
    assert [output.name for output in others] == ["familiar"] * familiar
    for n in (1, 3, 17):
        pixels = torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8)
        probs, *shares = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(probs, tclip.predict(student, pixels), atol=1e-5)
        if familiar:
            expected = load_familiarity(model)(predict(student, pixels)[1], torch.from_numpy(probs).argmax(1))
            np.testing.assert_allclose(shares[0], expected, atol=0.0021)  # steps of 0.001
            assert n < 17 or shares[0].std() > 0.1
    about = session.get_modelmeta().custom_metadata_map
    with safetensors.safe_open(model.with_suffix(".safetensors"), "pt") as content:
        assert content.metadata() == about
    assert (json.loads(about["classes"]), about["arch"], about["size"]) == (CLASSES, "resnet8", "16")
    again = tclip.Student(about["arch"], 3, int(about["size"]))
    again.load_state_dict(safetensors.load_file(model.with_suffix(".safetensors")))
    assert torch.equal(tclip.predict(student, pixels), tclip.predict(again, pixels))


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
    for hostile in (bomb, content | dict(classes=bomb), dict(content, extra=1), [1]):
        for zipped in (True, False):
            torch.save(hostile, file, _use_new_zipfile_serialization=zipped)
            refused()
    for share in (0, 0.5, 0.99):
        file.write_bytes(model.read_bytes()[: int(share * model.stat().st_size)])
        refused()
