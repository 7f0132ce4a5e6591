"""tclip_export: take a student elsewhere, as ONNX and as safetensors. Needs pip install -e ".[export]".

python tclip.py --export onnx --model runs/digits/model.pt
"""

import json
import warnings
from pathlib import Path

import onnxscript  # noqa: F401, torch.onnx needs it
import torch
from safetensors.torch import save_file
from torch import nn

import tclip


class Exported(nn.Module):
    """The student as others call it: pixels uint8 (B, 3, S, S) -> probs float32 (B, C)."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, pixels):
        return self.student(pixels.float() / 255)[0].softmax(1)


def export_student(path):
    """Write a run's model.pt again as model.onnx and model.safetensors beside it. Returns the path of the first.

    ONNX: pixels uint8 (B, 3, S, S) -> probs float32 (B, C), for any B; the class names are in its metadata as json.
    safetensors: the weights of the Student, with arch, size and classes in the metadata.
    UserError: no model.pt; it cannot be written.
    """
    student, classes = tclip.load_student(path)
    about = dict(arch=tclip.read_tensors(path)["arch"], size=str(student.size), classes=json.dumps(classes))
    example = torch.zeros(2, 3, student.size, student.size, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no concern to who exports
        program = torch.onnx.export(
            Exported(student).eval(), (example,), dynamo=True, verbose=False, dynamic_shapes=({0: "batch"},),
            input_names=["pixels"], output_names=["probs"],
        )  # fmt: skip
    program.model.metadata_props.update(about)
    onnx, safetensors = Path(path).with_suffix(".onnx"), Path(path).with_suffix(".safetensors")
    tclip.write_whole(onnx, program.save)
    weights = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    tclip.write_whole(safetensors, lambda draft: save_file(weights, draft, about))
    return onnx
