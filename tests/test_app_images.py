"""Folders of one's own images: every odd file that people have lying about is read right, or skipped and told; and
CLIP's features of them are kept."""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, rows_of
from PIL import Image

import tclip
from tclip import UserError, square
from tclip_app import images
from tclip_app.images import KeptFeatures, find, read_folder, read_image, usual_size

SIZE = 16  # of most images here, and of what is read: that is then what was written, to the pixel


# What every mode of Pillow should look like as RGB, by arithmetic of our own.


def over_white(rgb, alpha):
    """Colours (H, W, 3) seen through alpha (H, W) in 0..255, on white paper."""
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def stretched(values):
    """Gray of many bits, from its own darkest to its brightest value; what is no number counts as zero."""
    values = np.where(np.isfinite(values), values, 0).astype(float)
    return gray((values - values.min()) / max(values.max() - values.min(), 1e-12) * 255)


def gray(values):
    return np.repeat(np.asarray(values, float)[..., None], 3, axis=2)


def pictures(height, width):
    """By mode: a PIL image of it, what else its file says, and the colours (H, W, 3) that one should see."""
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
    one = np.where((colours == colours[0, 0]).all(2), 0, 255)
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
        "RGB-glass": (
            Image.fromarray(colours),
            dict(transparency=(*colours[0, 0].tolist(),)),
            over_white(colours, one),
        ),
        "I;16": (Image.fromarray(deep), {}, stretched(deep)),
        "I": (Image.fromarray(deep.astype(np.int32) - 9000), {}, stretched(deep)),
        "I-flat": (Image.fromarray(np.full((height, width), 70_000, np.int32)), {}, gray(np.zeros((height, width)))),
        "F": (Image.fromarray(real), {}, stretched(real)),
        "F-NaN": (Image.fromarray(holes), {}, stretched(holes)),
    }


LOSSLESS = dict(  # extension: modes that it keeps as they are
    png="1 L LA P RGB RGBA P-glass L-glass RGB-glass I;16", webp="RGB RGBA", bmp="1 L P RGB", gif="1 L P P-glass",
    tiff="1 L LA P RGB RGBA CMYK I;16 I I-flat F F-NaN", ppm="1 L RGB", ico="RGBA", tga="L LA P RGB RGBA",
    pcx="1 L P RGB", sgi="L RGB", dds="L RGB", jp2="L RGB RGBA",
)  # fmt: skip
LOSSY = dict(jpg="L RGB CMYK", mpo="RGB")
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
        how |= dict(lossless=True, exact=True) if name.endswith("webp") else {}
        image.save(root / name, **how | (dict(sizes=[image.size]) if name.endswith("ico") else {}))
        if expected is None:  # what the file has lost, Pillow tells
            with Image.open(root / name) as again:
                expected = np.asarray(again.convert("RGB"))
        seen[name] = expected

    for height, width in ((SIZE, SIZE), (31, 23)):
        modes = pictures(height, width)
        for extension, kinds in (LOSSLESS | LOSSY).items():
            for kind in kinds.split():
                image, info, rgb = modes[kind]
                save(f"{extension}/{kind} {height}.{extension}", image, rgb if extension in LOSSLESS else None, **info)
        for number, upright in enumerate(UPRIGHT, 1):
            exif = Image.Exif()
            exif[0x0112] = number
            for extension in ("jpg", "png", "webp", "tiff"):
                name = f"exif/{number} {height}.{extension}"
                save(name, modes["RGB"][0], None if extension == "jpg" else modes["RGB"][2], exif=exif)
                seen[name] = upright(seen[name])

    image, _, colours = pictures(SIZE, SIZE)["RGB"]
    more, empty = dict(save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))] * 2), b"Exif\0\0MM\0*\0\0\0\x08"
    save("broken exif.jpg", image, exif=empty + b"\xff\xff broken")
    save("animated.gif", image, **more)
    save("animated.png", image, colours, **more)
    save("pages.tiff", image, colours, **more)
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
    image = pictures(SIZE, SIZE)["RGB"][0]
    bad = {"empty.jpg": b"", "text.jpg": b"not an image", "zeros.png": bytes(1000), "vector.svg": b"<svg></svg>"}
    bad["bomb.png"] = png(60_000, 60_000, 8, bytes(10))  # would be ten gigabytes
    for kind, share in dict(jpeg=0.8, png=0.8, gif=0.3, tiff=0.8, bmp=0.02, webp=0.8, eps=1).items():
        file = io.BytesIO()  # EPS is a program, which is not run
        image.resize((200, 200)).save(file, kind)
        bad[f"cut.{kind}"] = file.getvalue()[: int(share * file.tell())]
    for name, content in bad.items():
        (root / name).write_bytes(content)
    return set(bad)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder of everything: (its path, dict of the readable names -> colours, set of the other names)."""
    root = tmp_path_factory.mktemp("photos")
    seen, bad = lay_readable(root), lay_unreadable(root)
    if os.name == "posix":
        outside = tmp_path_factory.mktemp("elsewhere") / "secret.png"
        Image.new("RGB", (SIZE, SIZE)).save(outside)
        colours = np.random.default_rng(5).integers(0, 256, (len(NAMES) + 2, 3)).tolist()
        for name, colour in zip(NAMES, colours):
            Image.new("RGB", (SIZE, SIZE), tuple(colour)).save(root / name, format="PNG")
            seen[name] = np.full((SIZE, SIZE, 3), colour)
        Image.new("RGB", (SIZE, SIZE), tuple(colours[-1])).save(os.fsencode(root) + b"/caf\xe9 \xff", format="PNG")
        seen["caf\\xe9 \\xff"] = np.full((SIZE, SIZE, 3), colours[-1])  # bytes that are no text, spelt out
        (root / "link inside.png").symlink_to("a/b/c/d/nested.png")
        seen["link inside.png"] = seen["a/b/c/d/nested.png"]
        os.mkfifo(root / "pipe.png")
        links = {"outside.png": outside, "to a folder": "a", "outside to a folder": outside.parent}
        links |= {"to nothing.png": "nothing.png", "loop.png": "link loop.png"}
        for name, where in links.items():
            (root / f"link {name}").symlink_to(where)
        bad |= {"pipe.png", *(f"link {name}" for name in links)}
    assert len(seen) > 180 and len(bad) > 15
    return root, seen, bad


@pytest.fixture(scope="module")
def read(odd, tmp_path_factory):
    """What read_folder() makes of it: names, pixels, rows of skipped.csv."""
    out = tmp_path_factory.mktemp("out")
    names, pixels, _ = read_folder(odd[0], SIZE, out)
    return names, pixels, rows_of(out / "skipped.csv")


def test_every_file_is_read_or_skipped(odd, read):
    """Each file is in one of the two lists, once: none is lost, none invented."""
    _, seen, bad = odd
    names, _, skipped = read
    assert sorted(names) == sorted(seen) and sorted(row["file"] for row in skipped) == sorted(bad)
    why = {row["file"]: row["reason"] for row in skipped}
    assert all(why.values()) and "\n" not in "".join(why.values()) and "exceeds limit" in why["bomb.png"]
    assert why["cut.eps"] == why["text.jpg"] == "of no format that is read"


def test_pixels_are_those_of_the_file(odd, read):
    """Whatever the mode, the depth, the transparency and the EXIF: the colours are those that one would see."""
    wrong = {}
    for name, pixels in zip(read[0], read[1]):
        expected = odd[1][name]
        if expected.shape != (SIZE, SIZE, 3):
            expected = square(Image.fromarray(np.asarray(expected).round().astype(np.uint8)), SIZE)
            expected = expected.permute(1, 2, 0).numpy()
        difference = np.abs(pixels.permute(1, 2, 0).numpy() - expected.astype(float)).max()
        if difference > 1.01:  # a rounding apart
            wrong[name] = difference
    assert not wrong


def test_strict(odd, tmp_path):
    """strict: the first file that is no image is named in one line."""
    with pytest.raises(UserError, match="cannot read (.*): ") as error:
        read_folder(odd[0], SIZE, tmp_path, strict=True)
    assert any(f"cannot read {name}: " in str(error.value) for name in odd[2]) and not os.listdir(tmp_path)


def test_damaged_files(tmp_path):
    """Files of every format that Pillow writes, cut off or with bytes changed: each is an image or has a reason."""
    rng, draw, whole = np.random.default_rng(0), random.Random(0), []
    for kind in sorted(Image.SAVE.keys() - {"PDF", "EPS", "PALM"}):
        file = io.BytesIO()
        try:
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(file, kind)
        except (OSError, ValueError, KeyError):  # not of RGB, or its library is not there
            continue
        whole.append(file.getvalue())
    assert len(whole) > 15
    for i in range(40 * len(whole)):
        content = bytearray(whole[i % len(whole)])
        for _ in range(draw.choice([1, 3, 20])):
            content[draw.randrange(min(len(content), 150))] = draw.choice([0, 255, draw.randrange(256)])
        (tmp_path / f"{i:04d}").write_bytes(content[: draw.choice([None, draw.randrange(len(content))])])
    with images.quiet():
        results = [read_image(path, tmp_path) for path in find(tmp_path).values()]
    reasons = [result for result in results if isinstance(result, str)]
    assert len(reasons) > len(results) / 3 and all(reasons) and "\n" not in "".join(reasons)
    assert all(result.mode == "RGB" for result in results if not isinstance(result, str))


@pytest.mark.parametrize("error", [KeyError, ValueError])
def test_bugs_are_no_unreadable_files(error, tmp_path, monkeypatch):
    """A fault in the program, here in what makes 8 bits of 16, is raised as it is, and skips no file."""

    def broken(*arguments, **keywords):
        raise error("a bug")

    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    monkeypatch.setattr(np, "nan_to_num", broken)
    with pytest.raises(error, match="a bug"):
        read_folder(tmp_path, SIZE, tmp_path)


@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (40_000, 4)])
def test_lines_stay_small(shape, tmp_path, monkeypatch):
    """A line of pixels, scaled until it is as high as the student's images, would take gigabytes: only its middle is
    scaled, which is all that is seen of it."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), np.uint8))
    expected = square(image, 16)
    image.save(tmp_path / "line.png")
    read = read_image(tmp_path / "line.png", tmp_path)
    assert max(read.size) <= 16 * min(read.size) and torch.equal(square(read, 16), expected)


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
    student = tclip.Student("resnet8", 2, SIZE)
    torch.testing.assert_close(tclip.predict(student, pixels), tclip.predict(student, pixels.clone()), rtol=0, atol=0)


def test_features_are_kept(planted, tmp_path):
    """CLIP sees new and changed images alone, wherever an image lies and whatever it is called by now."""
    file, good = tmp_path / "cache/features.npz", len(find(planted)) - 100 - 85

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


def test_features_of_an_interrupted_pass(planted, tmp_path, monkeypatch):
    """What CLIP had seen when the run was stopped, it does not see again."""
    clip, file = Eye(), tmp_path / "features.npz"
    encode = clip.encode_images

    def stop(views):
        if clip.seen > 10:
            raise KeyboardInterrupt
        return encode(views)

    monkeypatch.setattr(clip, "encode_images", stop)
    with pytest.raises(KeyboardInterrupt):
        read_folder(planted, SIZE, tmp_path, features=KeptFeatures(clip, file))
    again = KeptFeatures(Eye(), file)
    assert len(again.rows) == clip.seen - 4 > 10


@pytest.mark.parametrize("damage", [lambda c: c[:50], lambda c: c[:-50], lambda c: b"", lambda c: b"no zip" * 9])
def test_damaged_features(damage, tmp_path):
    """A file of features that is cut off is named, with what to do."""
    file, kept = tmp_path / "features.npz", KeptFeatures(Eye(), tmp_path / "features.npz")
    kept.encode([(bytes(20), torch.ones(3, 2, 2))])
    kept.save()
    assert len(KeptFeatures(Eye(), file).rows) == 1
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="features.npz.*delete it"):
        KeptFeatures(Eye(), file)


def test_names(tmp_path):
    """Names are paths below the folder with "/" between, of a single file its name; what systems lay there is none."""
    for name in ("b/2.png", "b/c/3.png", "a/1.png", ".hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    for name in (".DS_Store", "b/.DS_Store", "b/._c.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "empty").mkdir()
    assert list(find(tmp_path)) == [".hidden.png", "a/1.png", "b/2.png", "b/c/3.png"]
    assert list(find(tmp_path / "b/2.png")) == ["2.png"]
    assert read_image(tmp_path / "b/2.png", tmp_path / "b/2.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "sides, expected",
    [([1], 32), ([63], 32), ([64], 64), ([20, 70, 70], 64), ([96], 96), ([500] * 30, 128), ([9, 9, 200], 32)],
)
def test_usual_size(sides, expected, tmp_path):
    """The student's images are as large as half of the images are, within reason; what is no image has no say."""
    (tmp_path / "0.txt").write_text("no image")
    for i, side in enumerate(sides):
        Image.new("L", (side, 2 * side)).save(tmp_path / f"{i}.png")
    assert usual_size(tmp_path) == expected
