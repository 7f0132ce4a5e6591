"""A student for other programs: ONNX and safetensors. Needs pip install "tclip[export]"."""

import json
import warnings

import onnxscript  # noqa: F401, torch.onnx needs it
import safetensors.torch
import torch
from torch import nn

from tclip_app.familiarity import with_features
from tclip_app.files import write_whole


class Exported(nn.Module):
    """The student as others call it: pixels uint8 (B, 3, S, S) -> probs float32 (B, C), familiar float32 (B,)."""

    def __init__(self, student, familiarity=None):
        super().__init__()
        self.student, self.familiarity = with_features(student), familiarity

    def forward(self, pixels):
        logits, features = self.student(pixels.float() / 255)
        return logits.softmax(1), *([self.familiarity(features, logits.argmax(1))] if self.familiarity else [])


def export_student(student, classes, path, familiarity=None):
    """Write path.onnx and path.safetensors in place of the suffix of `path`, and return the two paths.

    ONNX: pixels uint8 (B, 3, S, S) -> probs float32 (B, C) and, if there is a Familiarity, familiar float32 (B,), for
    any B. safetensors: the weights of the Student. Both have arch, size and classes (as json) in their metadata.
    UserError: a file cannot be written.
    """
    about = dict(arch=student.arch, size=str(student.size), classes=json.dumps(classes))
    example = torch.zeros(2, 3, student.size, student.size, dtype=torch.uint8)
    exported, outputs = Exported(student, familiarity).eval(), ["probs", "familiar"][: 2 if familiarity else 1]
    with warnings.catch_warnings(action="ignore"):  # of no concern to who exports
        program = torch.onnx.export(
            exported, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},),
            input_names=["pixels"], output_names=outputs,
        )  # fmt: skip
    program.model.metadata_props.update(about)
    onnx, tensors = path.with_suffix(".onnx"), path.with_suffix(".safetensors")
    write_whole(onnx, lambda draft: draft.write(program.model_proto.SerializeToString()))
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    write_whole(tensors, lambda draft: draft.write(safetensors.torch.save(weights, about)))
    return onnx, tensors
