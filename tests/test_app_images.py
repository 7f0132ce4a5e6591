"""Folders of one's own images: every odd file that people have lying about is read right, or skipped and told; and
CLIP's features of them are kept."""

import io
import os
import random
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, rows_of
from PIL import Image

from tclip import UserError, square
from tclip_app import images
from tclip_app.images import KeptFeatures, read_folder, read_image

SIZE = 16  # of most images here, and of what is read: that is then what was written, to the pixel


def over_white(rgb, alpha):
    """Colours (H, W, 3) seen through alpha (H, W) in 0..255, on white paper."""
    return 255 + (rgb - 255.0) * alpha[..., None] / 255


def stretched(values):
    """Gray of many bits, from its own darkest to its brightest value; what is no number counts as zero."""
    values = np.where(np.isfinite(values), values, 0).astype(float)
    return gray((values - values.min()) / max(values.max() - values.min(), 1e-12) * 255)


def gray(values):
    return np.repeat(np.asarray(values, float)[..., None], 3, axis=2)


def pictures(height, width):
    """By mode: a PIL image of it, what else its file says, and the colours (H, W, 3) that one should see, by arithmetic
    of our own."""
    rng = np.random.default_rng(height)
    colours, shades, alpha = (rng.integers(0, 256, (height, width, *n), np.uint8) for n in ((3,), (), ()))
    ink, index = rng.integers(0, 256, (height, width, 4), np.uint8), rng.integers(0, 8, (height, width), np.uint8)
    palette, bits = rng.integers(0, 256, (8, 3), np.uint8), shades > 127
    deep = rng.integers(1000, 30_000, (height, width), np.uint16)
    real = rng.normal(size=(height, width)).astype(np.float32)
    holes = real.copy()
    holes[0, :4] = np.nan, np.inf, -np.inf, -9
    indexed = Image.frombytes("P", (width, height), index.tobytes())
    indexed.putpalette(palette.tobytes())
    hidden = np.where(index == 3, 0, 255)  # the fourth colour of the palette is glass
    dark = np.where(shades == shades[0, 0], 0, 255)
    one, key = np.where((colours == colours[0, 0]).all(2), 0, 255), (*colours[0, 0].tolist(),)
    return {
        "1": (Image.fromarray(bits), {}, gray(bits * 255)),
        "L": (Image.fromarray(shades), {}, gray(shades)),
        "LA": (Image.fromarray(np.stack([shades, alpha], 2), "LA"), {}, over_white(gray(shades), alpha)),
        "P": (indexed, {}, palette[index]),
        "RGB": (Image.fromarray(colours), {}, colours),
        "RGBA": (Image.fromarray(np.dstack([colours, alpha])), {}, over_white(colours, alpha)),
        "CMYK": (Image.fromarray(ink, "CMYK"), {}, (255 - ink[..., :3].astype(float)) * (255 - ink[..., 3:]) / 255),
        "P-glass": (indexed, dict(transparency=3), over_white(palette[index], hidden)),
        "L-glass": (Image.fromarray(shades), dict(transparency=int(shades[0, 0])), over_white(gray(shades), dark)),
        "RGB-glass": (Image.fromarray(colours), dict(transparency=key), over_white(colours, one)),
        "I;16": (Image.fromarray(deep), {}, stretched(deep)),
        "I": (Image.fromarray(deep.astype(np.int32) - 9000), {}, stretched(deep)),
        "I-flat": (Image.fromarray(np.full((height, width), 70_000, np.int32)), {}, gray(np.zeros((height, width)))),
        "F": (Image.fromarray(real), {}, stretched(real)),
        "F-NaN": (Image.fromarray(holes), {}, stretched(holes)),
    }


KINDS = dict(  # extension: modes that it keeps as they are
    png="1 L LA P RGB RGBA P-glass L-glass RGB-glass I;16", webp="RGB RGBA", bmp="1 L P RGB", gif="1 L P P-glass",
    tiff="1 L LA P RGB RGBA CMYK I;16 I I-flat F F-NaN", ppm="1 L RGB", ico="RGBA", jpg="L RGB CMYK", mpo="RGB",
)  # fmt: skip
UPRIGHT = [  # how a camera's sensor lay, by EXIF from 1 on: what to do with the stored rows (H, W, 3), by hand
    lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.transpose(1, 0, 2),
    lambda a: np.rot90(a, -1), lambda a: a[::-1, ::-1].transpose(1, 0, 2), lambda a: np.rot90(a),
]  # fmt: skip


def png(width, height, bits, data):
    """A png file of RGB with so many bits a channel, of which `data` is the content."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def lay_readable(root):
    """Write every kind of readable image. Returns dict name -> the colours (H, W, 3) that should be seen."""
    seen = {}

    def save(name, image, expected=None, **how):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        image.save(root / name, **how | dict(lossless=True, exact=True, sizes=[image.size]))
        if expected is None or name.endswith(("jpg", "mpo")):  # what the file has lost, Pillow tells
            with Image.open(root / name) as again:
                expected = np.asarray(again.convert("RGB"))
        seen[name] = expected

    for height, width in ((SIZE, SIZE), (31, 23)):
        modes = pictures(height, width)
        for extension, kind in ((extension, kind) for extension, kinds in KINDS.items() for kind in kinds.split()):
            image, info, rgb = modes[kind]
            save(f"{extension}/{kind} {height}.{extension}", image, rgb, **info)
        for number, upright in enumerate(UPRIGHT, 1):
            exif = Image.Exif()
            exif[0x0112] = number
            for extension in ("jpg", "png", "webp", "tiff"):
                save(name := f"exif/{number} {height}.{extension}", modes["RGB"][0], modes["RGB"][2], exif=exif)
                seen[name] = upright(seen[name])

    image, _, colours = pictures(SIZE, SIZE)["RGB"]
    save("broken exif.jpg", image, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    for name in ("animated.png", "pages.tiff"):
        save(name, image, colours, save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))] * 2)
    save("a png.jpg", image, colours, format="PNG")  # the content decides, not the name
    save("a/b/c/d/nested.png", image, colours)
    deep = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype(">u2")
    (root / "48 bits.png").write_bytes(png(SIZE, SIZE, 16, b"".join(b"\0" + row.tobytes() for row in deep)))
    seen["48 bits.png"] = deep // 256
    for name, shape in {"pixel.png": (1, 1), "wide.png": (3000, 1), "tall.png": (1, 3000)}.items():
        save(name, Image.new("RGB", shape, (10, 20, 30)), np.full((SIZE, SIZE, 3), (10, 20, 30)))
    return seen


def lay_unreadable(root):
    """Write every kind of file that is no readable image. Returns their names."""
    bad = {"empty.jpg": b"", "text.jpg": b"not an image", "zeros.png": bytes(1000), "vector.svg": b"<svg></svg>"}
    bad["bomb.png"] = png(60_000, 60_000, 8, bytes(10))  # would be ten gigabytes
    for kind, share in dict(jpeg=0.8, png=0.8, gif=0.3, tiff=0.8, bmp=0.02, webp=0.8, eps=1).items():
        file = io.BytesIO()  # EPS is a program, which is not run
        pictures(200, 200)["RGB"][0].save(file, kind)
        bad[f"cut.{kind}"] = file.getvalue()[: int(share * file.tell())]
    for name, content in bad.items():
        (root / name).write_bytes(content)
    return set(bad)


def lay_everything(root, outside):
    """A folder of all these. Returns the readable names -> colours, and the set of the other names."""
    seen, bad = lay_readable(root), lay_unreadable(root)
    if os.name == "posix":
        Image.new("RGB", (SIZE, SIZE)).save(outside)
        for i, name in enumerate([*map(os.fsencode, NAMES), b"caf\xe9 \xff"]):
            Image.new("RGB", (SIZE, SIZE), (i, 9, 9)).save(os.fsencode(root) + b"/" + name, format="PNG")
            seen[unicodedata.normalize("NFC", name.decode(errors="backslashreplace"))] = np.full(
                (SIZE, SIZE, 3), (i, 9, 9)
            )
        (root / "link inside.png").symlink_to("a/b/c/d/nested.png")
        seen["link inside.png"] = seen["a/b/c/d/nested.png"]
        os.mkfifo(root / "pipe.png")
        links = {"outside.png": outside, "to a folder": "a", "outside to a folder": outside.parent}
        links |= {"to nothing.png": "nothing.png", "loop.png": "link loop.png"}
        for name, where in links.items():
            (root / f"link {name}").symlink_to(where)
        bad |= {"pipe.png", *(f"link {name}" for name in links)}
    for name in (".DS_Store", "a/.DS_Store", "a/._b.png", "Thumbs.db", "desktop.ini"):  # what systems lay there
        (root / name).write_bytes(b"not an image")
    for name in (".ipynb_checkpoints", "a/@eaDir", "a/.trash/b", "__MACOSX/a"):  # copies, by other programs
        (root / name).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE)).save(root / name / "copy.png")
    assert len(seen) > 140 and len(bad) > 15
    return seen, bad


def test_odd_files(tmp_path, capsys):
    """Each file is read or skipped: none is lost, none invented. Whatever the mode, the depth, the transparency and the
    EXIF: the colours are those that one would see. strict: the first file that is no image is named in one line."""
    (root := tmp_path / "photos").mkdir()
    seen, bad = lay_everything(root, tmp_path / "outside.png")
    names, all_pixels, _ = read_folder(root, SIZE, tmp_path)
    skipped = rows_of(tmp_path / "skipped.csv")
    assert "\n4 files in folders of the system are left out, such as " in "\n" + capsys.readouterr().err
    assert sorted(names) == sorted(seen) and sorted(row["file"] for row in skipped) == sorted(bad)
    why = {row["file"]: row["reason"] for row in skipped}
    assert all(why.values()) and "\n" not in "".join(why.values()) and "exceeds limit" in why["bomb.png"]
    assert why["cut.eps"] == why["text.jpg"] == "of no format that is read"
    wrong = {}
    for name, pixels in zip(names, all_pixels):
        expected = seen[name]
        if expected.shape != (SIZE, SIZE, 3):
            expected = square(Image.fromarray(np.asarray(expected).round().astype(np.uint8)), SIZE)
            expected = expected.permute(1, 2, 0).numpy()
        wrong[name] = np.abs(pixels.permute(1, 2, 0).numpy() - expected.astype(float)).max()
    assert not {name: difference for name, difference in wrong.items() if difference > 1.01}  # a rounding apart
    lines = [read_image(root / name, root).size for name in ("wide.png", "tall.png")]
    assert lines == [(16, 1), (1, 16)]  # scaled until it is as high as other images, the rest would take gigabytes
    with pytest.raises(UserError, match="cannot read bomb.png: "):
        read_folder(root, SIZE, tmp_path, strict=True)


def test_damaged_files(tmp_path):
    """Files of every format that Pillow writes, cut off or with bytes changed: each is an image or has a reason."""
    draw, results = random.Random(0), []
    for kind in "BMP DDS GIF ICNS ICO JPEG JPEG2000 MSP PCX PNG PPM SGI SPIDER TGA TIFF WEBP XBM".split():
        file = io.BytesIO()
        Image.effect_noise((30, 20), 99).convert("1" if kind in ("MSP", "XBM") else "L").save(file, kind)
        for i in range(40):
            content = bytearray(file.getvalue())
            for _ in range(draw.choice([1, 3, 20])):
                content[draw.randrange(min(len(content), 150))] = draw.choice([0, 255, draw.randrange(256)])
            (tmp_path / f"{kind} {i}").write_bytes(content[: draw.choice([None, draw.randrange(len(content))])])
            with images.quiet():
                results.append(read_image(tmp_path / f"{kind} {i}", tmp_path))
    reasons = [result for result in results if isinstance(result, str)]
    assert len(reasons) > len(results) / 3 and all(reasons) and "\n" not in "".join(reasons)
    assert all(result.mode == "RGB" for result in results if not isinstance(result, str))


def test_bugs_are_no_unreadable_files(tmp_path, monkeypatch):
    """A fault in the program, here in what makes 8 bits of 16, is raised as it is, and skips no file."""
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr(np, "nan_to_num", lambda *a, **k: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        read_folder(tmp_path, SIZE, tmp_path)


@pytest.fixture
def planted(tmp_path_factory):
    """300 files, of which image i has a colour of its own; every third is broken, and so is a batch in the middle."""
    root = tmp_path_factory.mktemp("planted")
    for i in range(300):
        broken = i % 3 == 0 or 128 <= i < 256
        (root / f"{i:03d}.ppm").write_bytes(b"broken" if broken else b"P6 1 1 255\n" + bytes((i % 256, i // 256, 77)))
    return root


class Eye:
    """In place of a CLIP: the features of an image are its colour, of unit length. It notes how many it has seen."""

    def __init__(self, gain=1.0):
        self.seen, self.gain = 0, torch.tensor([gain, 1, 1])

    def prepare(self, image):
        return square(image, 2).float() + 1

    def encode_images(self, views):
        self.seen += len(views)
        return F.normalize(views.mean((2, 3)) * self.gain, dim=1)


@pytest.mark.parametrize("memory", [8.0, 0.0])
def test_skipped_files_shift_nothing(planted, memory, tmp_path):
    """Behind a skipped file every row is still its own image's: pixels, name, and what the teacher sees. So it is where
    the pixels lie in a file."""
    names, pixels, rows = read_folder(planted, SIZE, tmp_path, memory, features=KeptFeatures(Eye(), None))
    good = [i for i in range(300) if i % 3 and not 128 <= i < 256]
    assert names == [f"{i:03d}.ppm" for i in good]
    colours = torch.tensor([(i % 256, i // 256, 77) for i in good])
    assert torch.equal(pixels, colours.byte()[:, :, None, None].expand(-1, -1, SIZE, SIZE))
    torch.testing.assert_close(rows, F.normalize(colours + 1.0, dim=1))
    assert len(rows_of(tmp_path / "skipped.csv")) == 300 - len(good)
    assert (tmp_path / "pixels.bin").exists() == (memory == 0)


def test_features_are_kept(planted, tmp_path):
    """CLIP sees new and changed images alone, wherever an image lies and whatever it is called by now."""
    file, good = tmp_path / "cache/features.npz", 300 - 100 - 85

    def read(clip=None):
        clip = clip or Eye()
        before = (kept := KeptFeatures(clip, file)) and clip.seen
        names, pixels, rows = read_folder(planted, SIZE, tmp_path, features=kept)
        torch.testing.assert_close(rows, clip.encode_images(pixels[:, :, :2, :2].float() + 1))
        return clip.seen - before - len(names)

    assert read() == good and read() == 0
    (planted / "001.ppm").write_bytes(b"P6 1 1 255\n" + bytes((9, 9, 9)))  # another image of the same name and size
    assert read() == 1
    (planted / "002.ppm").rename(planted / "another name.ppm")
    (planted / "004.ppm").unlink()
    (planted / "005 again.ppm").write_bytes((planted / "005.ppm").read_bytes())
    assert read() == 0
    (planted / "new.ppm").write_bytes(b"P6 1 1 255\n" + bytes((1, 2, 3)))
    assert read() == 1
    assert read(Eye(gain=1.1)) == read() == good  # another model is not answered from the old one's
    with np.load(file, allow_pickle=False) as content:
        assert set(content) == {"keys", "features", "probe"}
    assert os.listdir(file.parent) == ["features.npz"]
    for cut in (1000, 50, 0):
        os.truncate(file, cut)
        with pytest.raises(UserError, match="features.npz.*delete it"):
            KeptFeatures(Eye(), file)


def test_features_of_an_interrupted_pass(planted, tmp_path, monkeypatch):
    """What CLIP had seen when the run was stopped, it does not see again."""
    clip, file = Eye(), tmp_path / "features.npz"
    stopped = iter((clip.encode_images, clip.encode_images))  # then there is none: StopIteration
    monkeypatch.setattr(clip, "encode_images", lambda views: next(stopped)(views))
    with pytest.raises(StopIteration):
        read_folder(planted, SIZE, tmp_path, features=KeptFeatures(clip, file))
    assert len(KeptFeatures(Eye(), file).rows) == clip.seen - 4 > 10
