"""The student's network by its name: resnet8, torchvision's resnets, or any network of timm."""

import difflib
from urllib.error import URLError

import torch
import torchvision
from torch import nn

import tclip
from tclip import UserError


def build(arch, num_classes, size, pretrained=False):
    """A tclip.Student for images `size` px square; `arch` may be timm:NAME, too.

    pretrained: with timm's weights, which it downloads or has at hand, in place of random ones. UserError: there is no
    such network, it is for larger images, or its weights cannot be had.
    """
    name = arch.removeprefix("timm:")
    known = ["resnet8", *(name for name in torchvision.models.list_models() if name.startswith("resnet"))]
    if arch in known and not pretrained:
        return tclip.Student(arch, num_classes, size)
    import timm

    known += [f"timm:{x}" for x in dict.fromkeys(timm.list_models() + timm.list_models(pretrained=True))]
    if arch not in known:
        near = ", ".join(difflib.get_close_matches(arch, known, cutoff=0))
        raise UserError(f"--arch {arch}: there is resnet8, resnet18 and others of torchvision, timm:NAME; near: {near}")
    if pretrained and not (name != arch and timm.is_model_pretrained(name)):
        raise UserError(f"--pretrained: there are no weights of {arch}; of timm:resnet18.tv_in1k, say, there are")
    return tclip.Student(arch, num_classes, size, backbone=timm_network(name, size, pretrained))


def timm_network(name, size, pretrained):
    """A network of timm for images (B, 3, size, size), and the width of its features (B, width).

    They are made for images of some 224 px, of which most leave a 32nd: up to 64 px they see them enlarged fourfold.
    """
    import timm
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    factor = 4 if size <= 64 else 1
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    how = dict(img_size=factor * size) if fixed else {}
    try:
        network = timm.create_model(name, pretrained, num_classes=0, **how)
    except (HfHubHTTPError, LocalEntryNotFoundError, URLError) as error:
        raise UserError(f"--pretrained: no weights of {name} at hand, and no download: {error}") from error
    network = nn.Sequential(nn.Upsample(scale_factor=factor, mode="bilinear"), network) if factor > 1 else network
    keep_activations(network)
    try:
        with torch.no_grad():
            features = network.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:  # shrunk to nothing, or made for other sizes alone
        raise UserError(f"--arch timm:{name} takes no images of {size} px: {error}") from error
    return network.train(), features.shape[1]


def keep_activations(module):
    """Part timm's BatchNorms from the activations within them, which torch's SyncBatchNorm would drop."""
    from timm.layers import BatchNormAct2d

    for name, child in module.named_children():
        keep_activations(child)
        if isinstance(child, BatchNormAct2d):
            plain = nn.BatchNorm2d(child.num_features, child.eps, child.momentum, child.affine)
            plain.load_state_dict(child.state_dict())
            setattr(module, name, nn.Sequential(plain, child.drop, child.act))
