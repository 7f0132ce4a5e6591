"""A folder of any images as pixels, and CLIP's features of them."""

import atexit
import hashlib
import io
import math
import os
import re
import struct
import sys
import time
import warnings
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import functional as TF
from tqdm import tqdm

import tclip
from tclip import UserError
from tclip_app.files import write_whole
from tclip_app.names import composed

SYSTEM_FILES = r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini"  # that macOS and Windows lay into folders of images
# Hidden folders and those of disk stations hold copies and thumbnails of the images.
SYSTEM_FOLDERS = r"\..+|@eaDir|@Recycle|#recycle|#snapshot|__MACOSX|\$RECYCLE\.BIN|System Volume Information"
# What Pillow raises on broken files: seen on 36,000 of them, with its versions 10.1 and 13. A KeyError, say, is a bug.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError, OverflowError, EOFError, struct.error)
UNREADABLE += (Image.DecompressionBombError,)
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]  # EPS is a program, which Pillow would have Ghostscript run


def tell(message):
    """A remark on stderr, which does not break the progress bar."""
    tqdm.write(" ".join(message.splitlines()), file=sys.stderr)


# ---- Files -----------------------------------------------------------------------------------------------------------
def find(root, told=False):
    """All files below a folder, or one file: dict name -> Path. UserError: there is no such folder, or no file in it.

    Names are relative paths with "/" between, composed() and sorted; bytes that are no text are spelt as \\x... What is
    in SYSTEM_FOLDERS is left out. told: say so on stderr.
    """
    root = Path(root)
    if not os.path.exists(root):
        raise UserError(f"{root}: there is no such folder")
    if root.is_file():
        return {composed(spelt(root.name)): root}

    def order(path):
        return composed(str(path)).split(os.sep), composed(str(path)) != str(path)

    every = [path for path in sorted(root.rglob("*"), key=order) if not re.fullmatch(SYSTEM_FILES, path.name)]
    # A folder counts as a file where its files are out of reach.
    paths = [path for path in every if path.is_symlink() or not path.is_dir() or not os.access(path, os.R_OK)]
    found, copies = {}, []
    for path in paths:
        if any(re.fullmatch(SYSTEM_FOLDERS, part) for part in path.relative_to(root).parts[:-1]):
            copies.append(path)
        else:
            name = spelt(path.relative_to(root).as_posix())
            found[composed(name, found)] = path
    left_out = f"{len(copies)} files in folders of the system are left out, such as {copies[0]}" if copies else ""
    if not found:
        raise UserError(f"there is no file in {root} {left_out}")
    if left_out and told:
        tell(left_out)
    return found


def spelt(name):
    return os.fsencode(name).decode(errors="backslashreplace")


def open_image(path, root):
    """A file below the folder `root` as Pillow's image, its content not yet read. One of UNREADABLE: it is none.

    Links are followed only to files within the folder (or where the one image that was named is a link).
    """
    if root.is_dir() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise OSError("a link out of the folder")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise OSError("no regular file")
    return Image.open(path, formats=FORMATS)


def read_image(path, root):
    """A file below the folder `root` as an upright RGB image, or the reason, a string, why it is none.

    Turned as its EXIF says, over white where transparent. Gray of 16 or 32 bits is stretched from its own darkest to
    its brightest value: such images seldom fill their range. The ends of a long line of pixels are cut off.
    """
    try:
        with open_image(path, root) as image:
            image.load()
            with suppress(SyntaxError, ValueError, TypeError, struct.error):  # where the EXIF is broken the rest is not
                image = ImageOps.exif_transpose(image)
            if image.mode[0] not in "IF":
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except UNREADABLE as error:
        known = not isinstance(error, UnidentifiedImageError)
        return (known and str(error).split("\n")[0]) or "of no format that is read"
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        values = (values - values.min()) / max(np.ptp(values), 1e-12)
        image = Image.fromarray((255 * values).round().astype(np.uint8))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    short = 16 * min(image.size)  # a line, scaled until it is as high as the student's images, would take gigabytes
    return TF.center_crop(image.convert("RGB"), [min(image.height, short), min(image.width, short)])


def usual_size(root):
    """Side for the student's images: the largest of 32, 64, 96 and 128 that half of (up to 20) images reach."""
    paths, sides = list(find(root).values()), []
    for path in paths[:: math.ceil(len(paths) / 20)]:
        with quiet(), suppress(*UNREADABLE), open_image(path, Path(root)) as image:
            sides.append(min(image.size))
    median = sorted(sides)[len(sides) // 2] if sides else 0
    return max(side for side in (32, 64, 96, 128) if side <= max(median, 32))


def quiet():
    """Without Pillow's warnings: of large images, broken EXIF and the like."""
    return warnings.catch_warnings(action="ignore")


# ---- CLIP's features, kept between runs ------------------------------------------------------------------------------
class KeptFeatures:
    """CLIP's image features in a file: an image is encoded once, until it or CLIP is another.

    They are found by a digest of the image file's content, so that files may be added, changed, moved and removed. All
    are dropped where CLIP answers otherwise to four images of coloured squares. UserError: the file is damaged.
    """

    def __init__(self, clip, file):
        self.clip, self.file, self.rows, self.new = clip, file, {}, 0
        squares = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        views = [clip.prepare(Image.fromarray(x).resize((224, 224), Image.Resampling.NEAREST)) for x in squares]
        self.probe = clip.encode_images(torch.stack(views)).numpy()  # (4, D)
        self.saved = time.monotonic()
        if not file or not file.exists():
            return
        try:
            with np.load(file, allow_pickle=False) as kept:
                keys, rows, probe = (kept[name] for name in ("keys", "features", "probe"))
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {file}, which keeps CLIP's image features: delete it") from error
        if probe.shape == self.probe.shape and np.allclose(probe, self.probe, atol=0.005):
            self.rows = dict(zip(map(bytes, keys), rows))

    def prepare(self, path, image):
        """The digest of an image's file, and what CLIP has to see of it: None where the features are known."""
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=20)).digest()
        return key, None if key in self.rows else self.clip.prepare(image)

    def encode(self, prepared):
        """B results of prepare() -> unit rows, float32 (B, D)."""
        new = {key: view for key, view in prepared if view is not None}
        if new:
            self.rows |= zip(new, self.clip.encode_images(torch.stack(list(new.values()))).numpy())
            self.new += len(new)
        if time.monotonic() - self.saved > 300:  # what five minutes have encoded, no power cut takes away
            self.save()
        return torch.from_numpy(np.stack([self.rows[key] for key, _ in prepared]))

    def save(self):
        if self.file and self.new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            keys = np.frombuffer(b"".join(self.rows), np.uint8).reshape(-1, 20)
            kept = dict(keys=keys, features=np.stack(list(self.rows.values())), probe=self.probe)
            write_whole(self.file, lambda draft: np.savez(draft, **kept))
            self.new, self.saved = 0, time.monotonic()


def features_file(cache, folder, model):
    """Where the features of a folder's images are kept, by its name: a folder that was moved is known again."""
    name = re.sub("[^A-Za-z0-9.]+", "-", f"{folder}-{model}")[:200]
    return None if cache == "none" else Path(cache).expanduser() / f"{name}.npz"


# ---- A folder as pixels ----------------------------------------------------------------------------------------------
def read_folder(root, size, out, memory=8.0, strict=False, features=None, as_file=False):
    """Read each image below `root` once: names (N), uint8 pixels (N, 3, size, size), features (N, D) or None.

    What is no readable image is listed in out/skipped.csv; strict: it is a UserError. More than `memory` gigabytes of
    pixels, or as_file, lie in out/pixels.bin, which is removed when the process ends. features: KeptFeatures.
    """
    root, files = Path(root), find(root, told=True)
    names, paths = list(files), list(files.values())

    def read(i):
        image = read_image(paths[i], root)
        if isinstance(image, str):
            return names[i], image, None, None
        return names[i], None, tclip.square(image, size), features and features.prepare(paths[i], image)

    as_file = as_file or len(names) * 3 * size**2 > memory * 1e9
    sink = create(out / "pixels.bin") if as_file else io.BytesIO()
    kept, rows, skipped = [], [], []
    try:
        with quiet():
            for batch in tclip.read_ahead(read, len(names), root.name):
                skipped += [dict(file=name, reason=reason) for name, reason, *_ in batch if reason]
                if strict and skipped:
                    raise UserError("cannot read {file}: {reason}".format(**skipped[0]))
                good = [(name, small, prepared) for name, reason, small, prepared in batch if not reason]
                if good:
                    some, pixels, prepared = zip(*good)
                    append(sink, torch.stack(pixels))
                    kept += some
                    rows += [features.encode(prepared)] if features else []
    finally:
        if features:
            features.save()
    if not kept:
        why = "{file}: {reason}".format(**skipped[0])
        raise UserError(f"none of {len(names)} files in {root} is a readable image, such as {why}")
    if skipped:
        tclip.write_csv(out / "skipped.csv", skipped)
        tell(f"{len(skipped)} of {len(names)} files are no readable images: see {out / 'skipped.csv'}")
    shape = len(kept), 3, size, size
    pixels = map_pixels(out, shape) if as_file else torch.frombuffer(sink.getbuffer(), dtype=torch.uint8).view(shape)
    return kept, pixels, torch.cat(rows) if features else None


def create(path):
    """A new file, which is removed when the process ends."""
    atexit.register(path.unlink, missing_ok=True)
    return open(path, "wb")


def append(sink, pixels):
    try:
        sink.write(pixels.numpy().tobytes())
        sink.flush()
    except OSError as error:  # the disk is full
        raise UserError(f"cannot write {sink.name}: {error}") from error


def map_pixels(out, shape):
    """The pixels that read_folder() wrote to out/pixels.bin; of the file, memory holds what is in use."""
    return torch.from_numpy(np.memmap(out / "pixels.bin", np.uint8, "r+", shape=shape))
