"""Augmentation, against torchvision's functions image by image."""

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from tclip import VIEWS, apply_views, augment, draw_views

BILINEAR = InterpolationMode.BILINEAR


def images(n=4, side=32, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def still(n=4, **changes):
    """The draw that leaves n images as they are, but for the named parameters."""
    draw = draw_views(n)
    return draw | {name: torch.as_tensor(value).float().expand(n) for name, value in changes.items()}


@pytest.mark.parametrize("kind", VIEWS)
def test_contract(kind):
    """Views are float32 in [0, 1] of the images' shape; the images stay as they were; the seed decides."""
    pixels = images(16)
    kept = pixels.clone()
    torch.manual_seed(1)
    views = augment(pixels, **VIEWS[kind])
    assert views.dtype == torch.float32 and views.shape == pixels.shape
    assert views.min() >= 0 and views.max() <= 1
    assert torch.equal(pixels, kept)
    assert not torch.equal(augment(pixels, **VIEWS[kind]), views)
    torch.manual_seed(1)
    assert torch.equal(augment(pixels, **VIEWS[kind]), views)


@pytest.mark.parametrize("kind", VIEWS)
def test_every_image_has_its_own_draw(kind):
    """The same image ten times over comes out as ten different views, different in every parameter that is drawn."""
    ranges = {k: v for k, v in VIEWS[kind].items() if k != "padding"}
    views = augment(images(1).expand(10, -1, -1, -1), **VIEWS[kind])
    assert all((views[i] - views[j]).abs().max() > 0.01 for i in range(10) for j in range(i))
    for name, values in draw_views(100, **ranges).items():
        fixed = (name == "mirrored") or (name == "angle" and not ranges.get("rotate"))
        assert fixed or len(values.unique()) > 50, name


@pytest.mark.parametrize("kind", VIEWS)
def test_two_views_at_once(kind):
    """Two views in one call: first those that a first call would give, then a second's, on a CPU to the bit."""
    pixels = images(5)
    torch.manual_seed(0)
    one_by_one = [augment(pixels, **VIEWS[kind]) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(augment(pixels, views=2, **VIEWS[kind]), torch.cat(one_by_one))


def test_identity():
    """With nothing to change, the image itself comes out, whatever the padding."""
    pixels = images()
    for padding in ("reflection", "zeros"):
        torch.testing.assert_close(apply_views(pixels, still(), padding), pixels / 255, rtol=0, atol=1e-6)
        torch.testing.assert_close(augment(pixels, padding), pixels / 255, rtol=0, atol=1e-6)


def test_window():
    """A window is torchvision's resized_crop, each image with a window of its own. The outermost pixels may differ:
    there torchvision repeats the edge of the window, and we look at what lies beyond it."""
    pixels = images()
    windows = [(4, 6, 16, 20), (0, 0, 32, 32), (11, 3, 20, 16), (16, 12, 16, 20)]  # top, left, height, width
    top, left, height, width = torch.tensor(windows).T / 32
    views = apply_views(pixels, still(top=top, left=left, height=height, width=width))
    for view, image, window in zip(views, pixels, windows):
        expected = TF.resized_crop(image / 255, *window, [32, 32], BILINEAR, antialias=False)
        torch.testing.assert_close(view[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_window_larger_than_the_image():
    """Above an area of 1 the whole image lies shrunken within the view, and zeros around it."""
    white = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    view = apply_views(white, still(1, width=2.0, height=2.0, left=-0.25, top=-0.75), "zeros")[0]
    inside = torch.zeros(32, 32)
    inside[12:28, 4:20] = 1  # 16 x 16 pixels, an eighth of the view from the left, three eighths from the top
    torch.testing.assert_close(view[0].round(), inside)


def test_rotate_and_mirror():
    """Rotation and mirror are torchvision's rotate and hflip; outside are its zeros."""
    pixels, angles, mirrored = images(5), [30.0, -75.0, 180.0, 12.5, 90.0], [0, 1, 0, 1, 1]
    views = apply_views(pixels, still(5, angle=angles, mirrored=mirrored), "zeros")
    for view, image, angle, flip in zip(views, pixels, angles, mirrored):
        expected = TF.rotate(image / 255, angle, BILINEAR)
        torch.testing.assert_close(view, TF.hflip(expected) if flip else expected, rtol=0, atol=1e-4)


def test_window_then_rotate_then_mirror():
    """The three together are one sampling, in this order. (On a smooth ramp, where sampling twice loses nothing.)"""
    ramp = torch.linspace(30, 220, 64).round().to(torch.uint8)
    pixels = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), ramp.flip(0).expand(64, 64)])[None]
    draw = still(1, left=10 / 64, top=20 / 64, width=40 / 64, height=32 / 64, angle=25.0, mirrored=1.0)
    crop = TF.resized_crop(pixels[0] / 255, 20, 10, 32, 40, [64, 64], BILINEAR, antialias=False)
    expected = TF.hflip(TF.rotate(crop, 25.0, BILINEAR))
    view = apply_views(pixels, draw)[0]
    torch.testing.assert_close(view[:, 14:-14, 14:-14], expected[:, 14:-14, 14:-14], rtol=0, atol=0.01)


ADJUST = dict(brightness=TF.adjust_brightness, contrast=TF.adjust_contrast, saturation=TF.adjust_saturation)


@pytest.mark.parametrize("name", ADJUST)
def test_colour(name):
    """Brightness, contrast and saturation are torchvision's, clamped, each image with a factor of its own."""
    pixels, factors = images(), [0.0, 0.6, 1.0, 1.7]
    views = apply_views(pixels, still(**{name: factors}))
    for view, image, factor in zip(views, pixels, factors):
        torch.testing.assert_close(view, ADJUST[name](image / 255, factor), rtol=0, atol=1e-5)


def test_composition():
    """All in a row: rotate, mirror, brightness, contrast, saturation."""
    pixels = images()
    torch.manual_seed(0)
    draw = draw_views(4, rotate=40, flip=0.5, jitter=0.4, gray=0.3)
    for i, view in enumerate(apply_views(pixels, draw, "zeros")):
        expected = TF.rotate(pixels[i] / 255, draw["angle"][i].item(), BILINEAR)
        expected = TF.hflip(expected) if draw["mirrored"][i] else expected
        for name, adjust in ADJUST.items():
            expected = adjust(expected, draw[name][i].item())
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


def test_windows_lie_inside():
    """Up to an area of 1 no window reaches outside; its area and its proportion are those asked for where it fits."""
    draw = draw_views(2000, area=(0.2, 1.0), ratio=(0.5, 2.0))
    width, height, left, top = (draw[name] for name in ("width", "height", "left", "top"))
    assert (left >= 0).all() and (top >= 0).all()
    assert (left + width <= 1 + 1e-6).all() and (top + height <= 1 + 1e-6).all()
    fits = (width < 1) & (height < 1)
    area, ratio = (width * height)[fits], (width / height)[fits]
    assert 0.2 <= area.min() + 1e-6 < 0.25 and 0.9 < area.max() <= 1
    assert 0.5 <= ratio.min() + 1e-6 < 0.55 and 1.9 < ratio.max() <= 2 + 1e-5
    assert left.max() > 0.4 and top.max() > 0.4 and left.min() < 0.01 and top.min() < 0.01  # they move about


def test_windows_around():
    """From an area of 1 on, the whole image stays in view."""
    draw = draw_views(500, area=(1.0, 1.5), ratio=(1.0, 1.0))
    for start, length in (("left", "width"), ("top", "height")):
        assert (draw[start] <= 1e-6).all() and (draw[start] + draw[length] >= 1 - 1e-6).all()


def test_ranges():
    """Angles, mirrors, factors and greys come as often, and go as far, as asked."""
    draw = draw_views(5000, rotate=20, flip=0.25, jitter=0.3, gray=0.1)
    assert -20 <= draw["angle"].min() < -19 and 19 < draw["angle"].max() <= 20
    assert draw["mirrored"].unique().tolist() == [0, 1] and abs(draw["mirrored"].mean() - 0.25) < 0.03
    gray = draw["saturation"] == 0
    assert abs(gray.float().mean() - 0.1) < 0.02
    for factor in (draw["brightness"], draw["contrast"], draw["saturation"][~gray]):
        assert 0.7 <= factor.min() + 1e-6 < 0.71 and 1.29 < factor.max() <= 1.3 + 1e-6


def test_kinds():
    """What has a left and a right, or an up and a down, keeps it; what has not, loses it."""
    draws = {kind: draw_views(2000, **{k: v for k, v in VIEWS[kind].items() if k != "padding"}) for kind in VIEWS}
    for kind in ("writing", "street"):
        assert draws[kind]["mirrored"].sum() == 0 and 0 < draws[kind]["angle"].abs().max() < 45
    for kind in ("photo", "overhead"):
        assert abs(draws[kind]["mirrored"].mean() - 0.5) < 0.05
    assert draws["photo"]["angle"].abs().max() == 0
    assert draws["overhead"]["angle"].min() < -170 and draws["overhead"]["angle"].max() > 170
