"""Folders of one's own images: every odd file that people have lying about is read right, or skipped and told."""

import csv
import os
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

import tclip
from tclip import Folder, main, read_images, square

SIZE = 16  # of the student's images, and of most images here: what is read is then what was written, to the pixel
TINY = ("--size", SIZE, "--arch", "resnet8", "--epochs", "1", "--device", "cpu", "--label-neighbours", "3")
posix = pytest.mark.skipif(os.name != "posix", reason="such files need a POSIX system")


@pytest.fixture(scope="module", autouse=True)
def no_endless_wait():
    """A named pipe that is opened waits for ever: end that as a failure."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for ever"))
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files_of(path):
    """The column `file` of a csv file of tclip, as the names were before they were guarded against spreadsheets."""
    return [tclip.unguarded(row["file"]) for row in rows_of(path)]


def call(*arguments):
    return main([str(argument) for argument in arguments])


def solid(path, colour, side=SIZE):
    """A file of one colour, of which every pixel tells its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


# ----------------------------------------------------------------------------------------------------------------------
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
        "P glass": (indexed, dict(transparency=3), over_white(palette[index], hidden)),
        "L glass": (Image.fromarray(shades), dict(transparency=int(shades[0, 0])), over_white(gray(shades), dark)),
        "RGB glass": (
            Image.fromarray(colours),
            dict(transparency=tuple(map(int, colours[0, 0]))),
            over_white(colours, one),
        ),
        "I;16": (Image.fromarray(deep), {}, stretched(deep)),
        "I": (Image.fromarray(deep.astype(np.int32) - 9000), {}, stretched(deep)),
        "I flat": (Image.fromarray(np.full((height, width), 70_000, np.int32)), {}, gray(np.zeros((height, width)))),
        "F": (Image.fromarray(real), {}, stretched(real)),
        "F NaN": (Image.fromarray(holes), {}, stretched(holes)),
    }


LOSSLESS = {  # extension: modes that it keeps as they are
    "png": ["1", "L", "LA", "P", "RGB", "RGBA", "P glass", "L glass", "RGB glass", "I;16"],
    "webp": ["RGB", "RGBA"],
    "bmp": ["1", "L", "P", "RGB"],
    "gif": ["1", "L", "P", "P glass"],
    "tiff": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "I flat", "F", "F NaN"],
    "ppm": ["1", "L", "RGB"],
    "ico": ["RGBA"],
    "tga": ["L", "LA", "P", "RGB", "RGBA"],
    "pcx": ["1", "L", "P", "RGB"],
    "sgi": ["L", "RGB"],
    "dds": ["L", "RGB"],
    "jp2": ["L", "RGB", "RGBA"],
}
LOSSY = {"jpg": ["L", "RGB", "CMYK", "YCbCr"], "webp": ["RGB"], "mpo": ["RGB"]}
UPRIGHT = {  # how a camera's sensor lay, by EXIF: what to do with the stored rows (H, W, 3), by hand
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
NAMES = [  # each is a file system's idea of a name
    "=SUM(A1)", "+1", "-1", "@you", "\ttab", "\rreturn", "'quoted", "'=twice", "'+1", "new\nline", "com,ma", 'quo"te',
    "two  words ", "per%cent", "日本語", "مرحبا", "\u202ereversed", "e\u0301 decomposed", "é composed", "\U0001f600",
    "#hash", "semi;colon", "back\\slash", "no extension", "x" * 240, ".hidden", "-", "--out", "NULL", "1e5",
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
    for height, width in ((SIZE, SIZE), (31, 23)):
        modes = pictures(height, width)
        for extension, kinds in LOSSLESS.items():
            for kind in kinds:
                image, info, rgb = modes[kind]
                name = f"{extension}/{kind} {height}.{extension}"
                (root / extension).mkdir(exist_ok=True)
                lossless = dict(lossless=True, exact=True) if extension == "webp" else {}
                icon = dict(sizes=[(width, height)]) if extension == "ico" else {}
                image.save(root / name, **info, **lossless, **icon)
                seen[name] = rgb
        for extension, kinds in LOSSY.items():  # what the file has lost, Pillow tells
            for kind in kinds:
                image = modes["RGB"][0].convert("YCbCr") if kind == "YCbCr" else modes[kind][0]
                name = f"lossy/{kind} {height}.{extension}"
                (root / "lossy").mkdir(exist_ok=True)
                image.save(root / name)
                with Image.open(root / name) as again:
                    seen[name] = np.asarray(again.convert("RGB"))
        stored = modes["RGB"][0]
        for number, upright in UPRIGHT.items():
            exif = Image.Exif()
            exif[0x0112] = number
            for extension in ("jpg", "png", "webp", "tiff"):
                name = f"exif/{number} {height}.{extension}"
                (root / "exif").mkdir(exist_ok=True)
                stored.save(root / name, exif=exif, **(dict(lossless=True) if extension == "webp" else {}))
                stored.save(root / "plain.jpg")
                rows = np.asarray(Image.open(root / "plain.jpg") if extension == "jpg" else stored)
                seen[name] = upright(rows)
        (root / "plain.jpg").unlink()

    square_one, _, colours = pictures(SIZE, SIZE)["RGB"]
    square_one.save(root / "broken exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    seen["broken exif.jpg"] = np.asarray(Image.open(root / "broken exif.jpg"))
    square_one.save(root / "animated.gif", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))] * 2)
    seen["animated.gif"] = np.asarray(Image.open(root / "animated.gif").convert("RGB"))
    square_one.save(root / "animated.png", save_all=True, append_images=[Image.new("RGB", (SIZE, SIZE))] * 2)
    square_one.save(root / "pages.tiff", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    square_one.save(root / "a png.jpg", format="PNG")  # the content decides, not the name
    deep = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype(">u2")
    (root / "48 bits.png").write_bytes(png(SIZE, SIZE, 16, b"".join(b"\0" + row.tobytes() for row in deep)))
    (root / "a/b/c/d").mkdir(parents=True)
    square_one.save(root / "a/b/c/d/nested.png")
    seen |= dict.fromkeys(["animated.png", "pages.tiff", "a png.jpg", "a/b/c/d/nested.png"], colours)
    seen["48 bits.png"] = deep // 256
    for name, (width, height) in {"pixel.png": (1, 1), "wide.png": (3000, 1), "tall.png": (1, 3000)}.items():
        Image.new("RGB", (width, height), (10, 20, 30)).save(root / name)
        seen[name] = np.full((SIZE, SIZE, 3), (10, 20, 30))
    return seen


def lay_unreadable(root):
    """Write every kind of file that is no readable image. Returns their names."""
    image = pictures(SIZE, SIZE)["RGB"][0]
    bad = {"empty.jpg": b"", "text.jpg": b"not an image", "page.html": b"<html>", "zeros.png": bytes(1000)}
    bad["database.db"] = bytes.fromhex("d0cf11e0a1b11ae1") + bytes(500)
    bad["vector.svg"] = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    bad["bomb.png"] = png(60_000, 60_000, 8, bytes(10))  # would be ten gigabytes
    bad["bomb.bmp"] = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6)
    for extension in ("jpg", "png", "gif", "tiff", "bmp", "webp"):
        whole = root / f"whole.{extension}"
        image.resize((200, 200)).save(whole)
        content = whole.read_bytes()
        for share in (0.02, 0.3, 0.8):
            bad[f"cut {share}.{extension}"] = content[: int(share * len(content))]
        whole.unlink()
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
        solid(outside, (1, 2, 3))
        colours = np.random.default_rng(5).integers(0, 256, (len(NAMES) + 2, 3)).tolist()
        for name, colour in zip(NAMES, colours):
            Image.new("RGB", (SIZE, SIZE), tuple(colour)).save(root / name, format="PNG")
            seen[name] = np.full((SIZE, SIZE, 3), colour)
        Image.new("RGB", (SIZE, SIZE), tuple(colours[-1])).save(os.fsencode(root) + b"/caf\xe9 \xff", format="PNG")
        seen["caf\\xe9 \\xff"] = np.full((SIZE, SIZE, 3), colours[-1])  # bytes that are no text, spelt out
        (root / "link inside.png").symlink_to("a/b/c/d/nested.png")
        seen["link inside.png"] = seen["a/b/c/d/nested.png"]
        os.mkfifo(root / "pipe.png")
        (root / "link outside.png").symlink_to(outside)
        (root / "link to a folder").symlink_to("a", target_is_directory=True)
        (root / "link outside to a folder").symlink_to(outside.parent, target_is_directory=True)
        (root / "link to nothing.png").symlink_to("nothing.png")
        (root / "loop.png").symlink_to("loop.png")
        bad |= {"pipe.png", "link outside.png", "link to a folder", "link outside to a folder"}
        bad |= {"link to nothing.png", "loop.png"}
    assert len(seen) > 180 and len(bad) > 20
    return root, seen, bad


@pytest.fixture(scope="module")
def read(odd):
    """What read_images() makes of it."""
    return read_images(Folder(odd[0]), SIZE, strict=False)


def test_every_file_is_read_or_skipped(odd, read):
    """Each file is in one of the two lists, once: none is lost, none invented."""
    _, seen, bad = odd
    _, names, _, _, skipped = read
    assert sorted(names) == sorted(seen) and sorted(row["file"] for row in skipped) == sorted(bad)
    assert all(row["reason"] and "\n" not in row["reason"] for row in skipped)


def test_pixels_are_those_of_the_file(odd, read):
    """Whatever the mode, the depth, the transparency and the EXIF: the colours are those that one would see."""
    wrong = {}
    for name, pixels in zip(read[1], read[0]):
        expected = odd[1][name]
        if expected.shape != (SIZE, SIZE, 3):
            expected = square(Image.fromarray(np.asarray(expected).round().astype(np.uint8)), SIZE)
            expected = expected.permute(1, 2, 0).numpy()
        difference = np.abs(pixels.permute(1, 2, 0).numpy() - expected.astype(float)).max()
        if difference > 1.01:  # a rounding apart
            wrong[name] = difference
    assert not wrong


def test_whole_run(odd, tmp_path, capfd):
    """A run on that folder: every readable file has its label, every other its reason, and nothing else is told."""
    root, seen, bad = odd
    with open(tmp_path / "teacher.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(tclip.guarded(name), "ab"[i % 2]) for i, name in enumerate(sorted(seen))]
        csv.writer(file).writerows([("file", "label"), *rows])
    run = tmp_path / "run"
    assert call("--images", root, "--pseudo-labels", tmp_path / "teacher.csv", "--out", run, *TINY) == 0
    assert sorted(files_of(run / "labels.csv")) == sorted(seen)
    assert sorted(files_of(run / "skipped.csv")) == sorted(bad)
    said = dict(zip(files_of(run / "labels.csv"), (row["teacher_label"] for row in rows_of(run / "labels.csv"))))
    assert said == {name: "ab"[i % 2] for i, name in enumerate(sorted(seen))}
    error = capfd.readouterr().err
    assert f"{len(bad)} of {len(seen) + len(bad)} files" in error and "skipped.csv" in error
    assert "Warning" not in error and "Traceback" not in error


def test_strict(odd, tmp_path, capfd):
    """--strict stops at the first file that is no image, names it in one line, and trains nothing."""
    root, _, bad = odd
    arguments = ("--images", root, "--classes", "zero,one", "--clip", "offline", "--strict", "--no-cache")
    assert call(*arguments, "--out", tmp_path / "run", *TINY) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tclip: ")]
    assert any(f"cannot read {name}: " in line for name in bad)
    assert {file.name for file in (tmp_path / "run").iterdir()} <= {"config.json"}


@posix
def test_bomb_is_not_unpacked(odd, monkeypatch):
    """Of an image of many gigabytes the header alone is read."""
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was unpacked"))
    folder = Folder(odd[0])
    for name in ("bomb.png", "bomb.bmp"):
        with pytest.raises(Image.DecompressionBombError):
            folder[folder.names.index(name)]


@pytest.mark.parametrize("shape", [(3000, 1), (1, 3000), (40_000, 4)])
def test_lines_stay_small(shape, monkeypatch):
    """A line of pixels, scaled until it is as high as the student's images, would take gigabytes: only its middle is
    scaled, which is all that is seen of it."""
    rng, resize, areas = np.random.default_rng(0), Image.Image.resize, []
    image = Image.fromarray(rng.integers(0, 256, (*shape[::-1], 3), np.uint8))
    expected = TF.pil_to_tensor(TF.center_crop(TF.resize(image, 16, TF.InterpolationMode.BICUBIC), 16))

    def spy(*arguments):
        scaled = resize(*arguments)
        areas.append(scaled.size[0] * scaled.size[1])
        return scaled

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert torch.equal(square(image, 16), expected)
    assert max(areas) <= 16 * 16 * 17


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_folder_out_of_reach(tmp_path):
    """A folder that may not be read is told as one file that cannot be."""
    solid(tmp_path / "seen.png", "red")
    (tmp_path / "locked").mkdir(mode=0o000)
    _, names, _, _, skipped = read_images(Folder(tmp_path), SIZE, strict=False)
    assert names == ["seen.png"] and [row["file"] for row in skipped] == ["locked"]


def colour_of(i):
    return i % 256, i // 256, 77


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """500 files, of which image i has colour_of(i); every third is broken, and so is a whole batch in the middle."""
    root = tmp_path_factory.mktemp("planted")
    for i in range(500):
        file = root / f"{i:03d}.ppm"
        broken = i % 3 == 0 or 120 <= i < 400
        file.write_bytes(b"broken" if broken else b"P6 1 1 255\n" + bytes(colour_of(i)))
    return root


@pytest.mark.parametrize("memory", [8.0, 0.0])
def test_skipped_files_shift_nothing(planted, memory, tmp_path):
    """Behind a skipped file every row is still its own image's: pixels, name, truth, and what the teacher says."""
    source = Folder(planted)
    source.labels = {f"{i:03d}.ppm": i for i in range(500) if i % 2}
    seen_by_teacher = {}

    def encode(views):
        seen_by_teacher[len(seen_by_teacher)] = len(views)
        return views[:, :, 2, 2].double()

    teacher_view = lambda image: square(image, 5)  # noqa: E731
    pixels, names, truth, rows, skipped = read_images(
        source, SIZE, teacher_view, encode, strict=False, memory=memory, folder=tmp_path
    )
    good = [i for i in range(500) if i % 3 and not 120 <= i < 400]
    assert names == [f"{i:03d}.ppm" for i in good] and len(skipped) == 500 - len(good)
    assert truth.tolist() == [i if i % 2 else -1 for i in good]
    colours = torch.tensor([colour_of(i) for i in good])
    assert torch.equal(rows, colours.double()) and 0 not in seen_by_teacher.values()
    assert isinstance(pixels, tclip.PixelFile) == (memory == 0) and len(pixels) == len(good) == pixels.shape[0]
    assert torch.equal(pixels[:], colours.byte()[:, :, None, None].expand(-1, -1, SIZE, SIZE))
    assert files_of(tmp_path / "skipped.csv") == [row["file"] for row in skipped]
    assert os.listdir(tmp_path) == ["skipped.csv"]  # the pixels' file has no name: it is gone when the process ends


def test_pixel_file_is_like_a_tensor(tmp_path):
    """A PixelFile gives the rows that a tensor gives: by slices, by index, and, a batch at a time, to predict()."""
    pixels = torch.randint(0, 256, (11, 3, 4, 4), dtype=torch.uint8)
    file = tclip.PixelFile(pixels.shape, tmp_path)
    file[5:11] = pixels[5:11]
    file[0:5] = pixels[0:5]
    index = torch.tensor([10, 0, 3, 3])
    assert torch.equal(file[index], pixels[index]) and torch.equal(file[2:7], pixels[2:7])
    assert torch.equal(file[8:12], pixels[8:12]) and len(file) == 11
    student = tclip.Student("resnet8", 2, 4)
    assert torch.equal(tclip.predict(student, file, 4 * 4 * 4), tclip.predict(student, pixels, 4 * 4 * 4))
    batch = file[index]
    batch.zero_()  # a batch is a copy
    assert torch.equal(file[:], pixels)


def test_same_student_from_the_disk(planted, tmp_path):
    """--memory 0 keeps the pixels on the disk, and gives the same student to the bit."""
    teacher = tmp_path / "teacher.csv"
    teacher.write_text("file,label\n" + "".join(f"{i:03d}.ppm,{'xy'[i % 5 < 2]}\n" for i in range(500)))
    for name, memory in (("memory", 8), ("disk", 0)):
        arguments = ("--images", planted, "--pseudo-labels", teacher, "--memory", memory, "--out", tmp_path / name)
        assert call(*arguments, *TINY) == 0
    first, second = (tclip.read_tensors(tmp_path / name / "model.pt") for name in ("memory", "disk"))
    assert all(torch.equal(first["student"][name], second["student"][name]) for name in first["student"])
    assert (tmp_path / "memory/labels.csv").read_bytes() == (tmp_path / "disk/labels.csv").read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="workers start slowly there")
def test_workers_and_none(tmp_path, monkeypatch):
    """Several processes read many files just as one does: the same rows in the same order, the same skipped."""
    for i in range(2100):
        content = b"P6 1 1 255\n" + bytes(colour_of(i)) if i % 7 else b""
        (tmp_path / f"{i:04d}.ppm").write_bytes(content)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    loader, counts = torch.utils.data.DataLoader, []

    def spy(*args, num_workers=0, **keywords):
        counts.append(num_workers)
        return loader(*args, num_workers=num_workers * (len(counts) == 1), **keywords)

    monkeypatch.setattr(torch.utils.data, "DataLoader", spy)
    by_two, by_one = (read_images(Folder(tmp_path), 8, strict=False) for _ in range(2))
    assert counts == [2, 2] and len(by_two[1]) == 1800
    assert torch.equal(by_two[0], by_one[0]) and torch.equal(by_two[2], by_one[2])
    assert by_two[1] == by_one[1] and by_two[4] == by_one[4]


def test_nested_names_and_one_file(tmp_path):
    """Names are paths below the folder with "/" between; of a single file, its name."""
    for name in ("b/2.png", "b/c/3.png", "a/1.png"):
        solid(tmp_path / name, "red")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    assert Folder(tmp_path).names == ["a/1.png", "b/2.png", "b/c/3.png"]
    alone = Folder(tmp_path / "b" / "2.png")
    alone.labels["2.png"] = 4
    assert alone.names == ["2.png"] and alone[0][1] == 4 and alone[0][0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "sides, expected",
    [
        ([1], 32),
        ([32], 32),
        ([63], 32),
        ([64], 64),
        ([20, 70, 70], 64),
        ([96], 96),
        ([500] * 30, 128),
        ([9, 9, 200], 32),
    ],
)
def test_usual_size(sides, expected, tmp_path):
    """The student's images are as large as half of the images are, within reason; what is no image has no say."""
    (tmp_path / "0.txt").write_text("no image")
    for i, side in enumerate(sides):
        Image.new("L", (side, 2 * side)).save(tmp_path / f"{i}.png")
    assert Folder(tmp_path).usual_size() == expected


@pytest.mark.parametrize(
    "files, word", [({}, "no file"), ({"a.txt": "text"}, "none of 1 files is a readable image"), (None, "not exist")]
)
def test_nothing_to_read(files, word, tmp_path, capfd):
    """No folder, an empty one, and one without images: one line."""
    if files is not None:
        (tmp_path / "photos").mkdir()
        for name, content in files.items():
            (tmp_path / "photos" / name).write_text(content)
    arguments = ("--images", tmp_path / "photos", "--classes", "zero,one", "--clip", "offline", "--no-cache", *TINY)
    assert call(*arguments, "--out", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert word in error and error.startswith("tclip: ") and "Traceback" not in error


@pytest.mark.parametrize("classes", [None, "cat", "cat,cat", ","])
def test_two_classes_are_needed(classes, planted, tmp_path, capfd):
    """Without two different class names there is nothing to tell apart."""
    given = ("--classes", classes) if classes else ()
    assert call("--images", planted, *given, "--out", tmp_path / "run", *TINY) == 2
    assert capfd.readouterr().err.startswith("tclip: ") and not (tmp_path / "run").exists()


def test_folder_is_left_as_it_was(planted):
    """Reading changes nothing in the folder."""
    before = {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in planted.iterdir()}
    read_images(Folder(planted), SIZE, strict=False)
    assert before == {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in planted.iterdir()}


def test_eps_is_not_run(tmp_path):
    """EPS is a program in PostScript: it is left alone, though Pillow would have Ghostscript run it."""
    Image.new("RGB", (9, 9)).save(tmp_path / "program.eps")
    with pytest.raises(OSError, match="not run"):
        Folder(tmp_path)[0]


def test_files_of_the_system(tmp_path):
    """What macOS and Windows lay into a folder of images by themselves is no image that could not be read."""
    for name in ("a.png", "b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    for name in (".DS_Store", "b/.DS_Store", "b/._c.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / ".hidden.png").write_bytes(b"an image that is cut off")
    assert tclip.Folder(tmp_path).names == [".hidden.png", "a.png", "b/c.png"]
