"""Augmentation, against torchvision's functions image by image, and its draws against RandomResizedCrop's."""

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

import tclip
from tclip import VIEWS, augment, draw_views

BILINEAR = InterpolationMode.BILINEAR


def images(n=4, side=32, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def still(n=4, **changes):
    """The draw that leaves n images as they are, but for the named parameters."""
    draw = draw_views(n)
    return draw | {name: torch.as_tensor(value).float().expand(n) for name, value in changes.items()}


def applied(pixels, draw, *padding):
    """The views that this draw makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tclip, "draw_views", lambda n, device: draw)
        return augment(pixels, *padding)


@pytest.mark.parametrize("kind", VIEWS)
def test_contract(kind):
    """Views are float32 in [0, 1], the first of all images, then the second; the images stay as they were; the seed
    decides. The same image ten times over is ten views, different in all that is drawn."""
    pixels, ranges = images(1).expand(10, -1, -1, -1).clone(), VIEWS[kind].copy()
    torch.manual_seed(1)
    views = augment(pixels, views=2, **ranges)
    torch.manual_seed(1)
    assert torch.equal(augment(pixels, views=2, **ranges), views)
    assert views.dtype == torch.float32 and views.shape == (20, 3, 32, 32) and views.min() >= 0 and views.max() <= 1
    assert torch.equal(pixels, images(1).expand(10, -1, -1, -1))
    assert all((views[i] - views[j]).abs().max() > 0.01 for i in range(20) for j in range(i))
    torch.testing.assert_close(augment(images(), views=2), torch.cat([images(), images()]) / 255, rtol=0, atol=1e-6)
    ranges.pop("padding", None)
    for name, values in draw_views(100, **ranges).items():
        assert len(values.unique()) > 50 or name == "mirrored" or (name == "angle" and "rotate" not in ranges)
    assert ("flip" in ranges) == (kind in ("photo", "overhead"))  # writing has no mirror image


def test_window():
    """A window is torchvision's resized_crop, each image with a window of its own. The outermost pixels may differ:
    there torchvision repeats the edge of the window, and we look at what lies beyond it."""
    windows = [(4, 6, 16, 20), (0, 0, 32, 32), (11, 3, 20, 16), (16, 12, 16, 20)]  # top, left, height, width
    top, left, height, width = torch.tensor(windows).T / 32
    views = applied(images(), still(top=top, left=left, height=height, width=width))
    for view, image, window in zip(views, images(), windows):
        expected = TF.resized_crop(image / 255, *window, [32, 32], BILINEAR, antialias=False)
        torch.testing.assert_close(view[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1e-5)


ADJUST = dict(brightness=TF.adjust_brightness, contrast=TF.adjust_contrast, saturation=TF.adjust_saturation)


def test_rotate_mirror_and_colour():
    """Rotation (outside are zeros), mirror, brightness, contrast and saturation are torchvision's, in this order."""
    torch.manual_seed(0)
    draw = draw_views(9, rotate=180, flip=0.5, jitter=0.8, gray=0.3)
    for i, view in enumerate(applied(images(9), draw, "zeros")):
        expected = TF.rotate(images(9)[i] / 255, draw["angle"][i].item(), BILINEAR)
        expected = TF.hflip(expected) if draw["mirrored"][i] else expected
        for name, adjust in ADJUST.items():
            expected = adjust(expected, draw[name][i].item())
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("area, ratio", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.5, 1.0), (0.5, 2.0))])
def test_windows_are_those_of_random_resized_crop(area, ratio):
    """Area, ratio and place are distributed as torchvision draws them: mean and deciles of 8000 windows agree, and none
    reaches outside."""
    torch.manual_seed(0)
    n, blank = 8000, torch.empty(1, 1000, 1000)  # so large that rounding to pixels does not show
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, area, ratio) for _ in range(n)]).T / 1000
    draw = draw_views(n, area, ratio)
    ours = torch.stack([draw[name] for name in ("top", "left", "height", "width")])
    assert (ours[:2] >= 0).all() and (ours[:2] + ours[2:] <= 1 + 1e-6).all()
    for mine, other in zip(*((t, e, h * w, (w / h).log()) for t, e, h, w in (ours, theirs))):
        assert abs(mine.mean() - other.mean()) < 0.01
        tenths = torch.linspace(0.1, 0.9, 9)
        torch.testing.assert_close(mine.quantile(tenths), other.quantile(tenths), rtol=0, atol=0.03)


def test_ranges():
    """Angles, mirrors, factors and greys come as often, and go as far, as asked. From an area of 1 on, the whole image
    stays in view."""
    draw = draw_views(5000, rotate=20, flip=0.25, jitter=0.3, gray=0.1)
    assert -20 <= draw["angle"].min() < -19 and 19 < draw["angle"].max() <= 20
    assert draw["mirrored"].unique().tolist() == [0, 1] and abs(draw["mirrored"].mean() - 0.25) < 0.03
    gray = draw["saturation"] == 0
    assert abs(gray.float().mean() - 0.1) < 0.02
    for factor in (draw["brightness"], draw["contrast"], draw["saturation"][~gray]):
        assert 0.7 <= factor.min() + 1e-6 < 0.71 and 1.29 < factor.max() <= 1.3 + 1e-6
    wide = draw_views(500, area=(1.0, 1.5), ratio=(1.0, 1.0))
    assert wide["width"].max() > 1.2 and (wide["left"] <= 0).all() and (wide["left"] + wide["width"] >= 1 - 1e-6).all()
