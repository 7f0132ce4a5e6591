"""Train a tiny CLIP that needs no download. It knows digits, and it has only ever seen printed ones.

    python tutorials/offline_clip.py                   # writes tclip_app/offline_clip.pt
    python tutorials/offline_clip.py --out there.pt    # 1 to 2 minutes on two CPU cores, 1.2 GB of memory

The model has the architecture of openai/CLIP (a very small "RN50" and a one-layer text transformer). It learns
from digits drawn in the fonts that matplotlib ships, distorted at random, paired with captions. It is then asked to
name scikit-learn's *handwritten* digits zero-shot. No handwritten image, nor a label of one, enters the training;
they are read once, at the end, to print the accuracy. What the model gets wrong there, it gets wrong because
handwriting differs from print.

One kind of tuning did take place: 9 settings (the strength of the distortions, the width of the strokes and of the
network, the temperature, the weight decay) were compared by their zero-shot accuracy on those handwritten digits,
which ranged from 22 to 80 %. The accuracy printed at the end is therefore a little flattering.

The file holds a plain state_dict in OpenAI's format, which `clip.model.build_model` and
`open_clip.model.build_model_from_openai_state_dict` both read. The seed and the number of threads are fixed, so a
second run on the same machine writes the same numbers. Another machine or PyTorch may round otherwise, and end at a
slightly different accuracy.
"""

import argparse
import io
import math
import zipfile
from pathlib import Path

import matplotlib
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from sklearn.datasets import load_digits
from torchvision import transforms
from tqdm import tqdm

STEPS = 500
IMAGES, CAPTIONS = 20, 4  # per digit and step: 200 images meet 40 captions
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.3
CANVAS = 64  # the side of the square on which a digit is distorted

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EVALUATED = ['a photo of the number: "{}".', "a photo of the digit {}.", "the handwritten digit {}."]
TEMPLATES = EVALUATED + ["{}", "a {}.", "the digit {}.", "the number {}.", "a handwritten {}.", "a printed {}."]
TEMPLATES += ["a drawing of a {}.", "the printed digit {}.", "a scan of the digit {}.", "a picture of a {}."]
TEMPLATES += ["a photo of a {}.", "an image of the number {}.", "a blurry photo of the digit {}."]
TEMPLATES += ["a low resolution scan of a {}.", "a black and white photo of the number {}."]
FONTS = [f"DejaVuSans{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")]
FONTS += [f"DejaVuSansMono{face}" for face in ("", "-Bold", "-Oblique", "-BoldOblique")]
FONTS += [f"DejaVuSerif{face}" for face in ("", "-Bold", "-Italic", "-BoldItalic")]
FONTS += ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"]
FONTS += ["cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"]

# OpenAI's own
NORMALIZE = transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Enlarging by PIL is linear, so the matrix that does it can be had by enlarging the unit vectors.
ENLARGE = torch.from_numpy(np.array(Image.fromarray(np.eye(8, dtype=np.float32)).resize((8, 32), Image.BICUBIC)))


def draw_glyphs():
    """Every digit in every font, each as a signed distance to its outline: above 0 is ink.

    A distance is easily made a thinner or a thicker stroke: just move the threshold.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fields = torch.empty(10, len(FONTS), CANVAS, CANVAS)
    for f, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 200)
        for digit in range(10):
            page = Image.new("L", (400, 400))
            ImageDraw.Draw(page).text((100, 50), str(digit), font=font, fill=255)
            glyph = page.crop(page.getbbox())
            glyph = glyph.resize((round(glyph.width * 160 / glyph.height), 160))
            page = Image.new("L", (256, 256))
            page.paste(glyph, ((256 - glyph.width) // 2, 48))
            ink = np.array(page) > 127
            distance = distance_transform_edt(ink) - distance_transform_edt(~ink)
            distance = torch.from_numpy(distance / 160).float()  # in heights of a digit
            fields[digit, f] = F.avg_pool2d(distance[None], 256 // CANVAS)[0]
    return fields  # (10, fonts, 64, 64)


def uniform(n, low, high):
    return torch.rand(n, 1, 1) * (high - low) + low


def extent(occupied):
    """First and last occupied place of each row of a (n, 64) mask."""
    places = torch.arange(CANVAS)
    return torch.where(occupied, places, CANVAS).amin(1), torch.where(occupied, places, -1).amax(1) + 1


def scan(fields, digits):
    """Distort a random glyph of each digit, and scan it as scikit-learn's digits were: in 8 x 8 shades of grey."""
    n = len(digits)
    field = fields[digits, torch.randint(len(FONTS), (n,))].unsqueeze(1)  # (n, 1, 64, 64)

    # Where each place of the canvas takes its ink from: a shear, a stretch, a turn, and a smooth random bend.
    line = torch.linspace(-1, 1, CANVAS)
    y, x = torch.meshgrid(line, line, indexing="ij")  # (64, 64)
    x = x * uniform(n, 0.65, 1.35) + y * uniform(n, -0.3, 0.3)  # (n, 64, 64)
    angle = uniform(n, -1, 1) * math.radians(15)
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    bend = F.interpolate(0.13 * torch.randn(n, 2, 4, 4), size=CANVAS, mode="bicubic", align_corners=True)
    grid = torch.stack([x, y], -1) + bend.permute(0, 2, 3, 1)  # (n, 64, 64, 2)
    field = F.grid_sample(field, grid, padding_mode="border", align_corners=True)

    # The width of the stroke, never so thin that no ink is left.
    thickest = field.amax((2, 3)).unsqueeze(2)  # (n, 1, 1)
    field = field + torch.maximum(uniform(n, -0.03, 0.05), -0.6 * thickest).unsqueeze(1)

    # Crop tight: the height fills the image, give or take a little, and the width keeps its proportion.
    ink = field.squeeze(1) > 0  # (n, 64, 64)
    (left, right), (top, bottom) = extent(ink.any(1)), extent(ink.any(2))
    half_height = (bottom - top) / 2
    half_width = torch.maximum(half_height, (right - left) / 2)
    pixels = (torch.arange(32) + 0.5) / 16 - 1  # (32,)
    x = (left + right)[:, None] / 2 + half_width[:, None] * (pixels + uniform(n, -0.06, 0.06)[:, 0])  # (n, 32)
    y = (top + bottom)[:, None] / 2 + half_height[:, None] * (pixels + uniform(n, -0.03, 0.03)[:, 0])
    grid = torch.stack([x[:, None, :].expand(n, 32, 32), y[:, :, None].expand(n, 32, 32)], -1) * 2 / CANVAS - 1

    # scikit-learn's digits are 32 x 32 bitmaps with the ink counted in blocks of 4 x 4. So are these.
    bitmap = (F.grid_sample(field, grid, padding_mode="border", align_corners=False) > 0).float()
    return F.avg_pool2d(bitmap, 4)  # (n, 1, 8, 8), from 0 to 1


def preprocess(scans):
    """What OpenAI's preprocessing does to an 8 x 8 image, for a whole batch: (n, 1, 8, 8) -> (n, 3, 32, 32)."""
    images = (ENLARGE @ (scans @ ENLARGE.T).clamp(0, 1)).clamp(0, 1)
    return NORMALIZE(images.expand(-1, 3, -1, -1))


def train():
    fields = draw_glyphs()
    # Each digit's captions, its name as a word and as a numeral: (10, captions, 77).
    tokens = [[t.format(name) for t in TEMPLATES for name in (NAMES[d], str(d))] for d in range(10)]
    tokens = torch.stack([open_clip.tokenize(captions) for captions in tokens])

    vision = open_clip.CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32)
    text = open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=1, layers=1)
    model = open_clip.CLIP(64, vision, text, quick_gelu=True)
    with torch.no_grad():
        # Words that no caption uses are never learned: zeros make them harmless, and the file small.
        unused = torch.ones(49408, dtype=torch.bool).index_fill(0, tokens.unique(), False)
        model.token_embedding.weight[unused] = 0
        # At 32 pixels the last feature map is 1 x 1, so the attention pool has a choice of two copies of one vector,
        # and three of its four matrices are idle. Fixing them changes nothing that matters, and saves 1.5 MB.
        pool = model.visual.attnpool
        for idle in (pool.q_proj, pool.k_proj, pool.v_proj):
            idle.requires_grad_(False)
            idle.weight.zero_()
            idle.bias.zero_()
        pool.v_proj.weight.fill_diagonal_(1)
    model.logit_scale.requires_grad_(False)  # set by hand below

    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)

    # CLIP's loss takes every other pair of a batch for a wrong one. Here many captions tell of the same digit, and all
    # of them are right: so an image's target is spread evenly over the captions of its digit, and a caption's target
    # over the images of its digit.
    of_image = torch.arange(10).repeat_interleave(IMAGES)  # (200,)
    of_caption = torch.arange(10).repeat_interleave(CAPTIONS)  # (40,)
    same = (of_image[:, None] == of_caption).float()  # (200, 40)

    progress = tqdm(range(STEPS))
    for step in progress:
        # From CLIP's first scale, 1 / 0.07, to its last, 1 / 0.01: begun at the last, training takes long to get going.
        model.logit_scale.data.fill_(math.log(1 / 0.07) + math.log(7) * step / (STEPS - 1))
        caption = tokens[of_caption, torch.randint(tokens.shape[1], of_caption.shape)]  # (40, 77)
        image = F.normalize(model.encode_image(preprocess(scan(fields, of_image))), dim=-1)  # (200, 64)
        text = F.normalize(model.encode_text(caption), dim=-1)  # (40, 64)
        logits = model.logit_scale.exp() * image @ text.T  # (200, 40)
        loss = F.cross_entropy(logits, same / CAPTIONS) + F.cross_entropy(logits.T, same.T / IMAGES)
        optimizer.zero_grad()
        (loss / 2).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            right = of_caption[logits.argmax(1)] == of_image
            progress.set_postfix(loss=f"{loss.item() / 2:.2f}", printed=f"{right.float().mean():.2f}")
    return model


def save(model, path):
    """Write the state_dict with matrices in half precision, rounded to 8 significant bits, and compressed."""
    state = {k: v.bfloat16().half() if v.ndim > 1 else v for k, v in model.state_dict().items()}
    torch.save(state, plain := io.BytesIO())
    # torch.save writes a zip archive and compresses nothing in it; torch.load reads a compressed one as well.
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            target.writestr(entry, source.read(entry), zipfile.ZIP_DEFLATED, compresslevel=9)


@torch.no_grad()
def evaluate(path):
    """Zero-shot accuracy of the written file on scikit-learn's handwritten digits."""
    state = torch.load(path, weights_only=True)
    model = open_clip.model.build_model_from_openai_state_dict(state, cast_dtype=torch.float32).float()
    transform = open_clip.image_transform(32, is_train=False, mean=NORMALIZE.mean, std=NORMALIZE.std)
    handwritten = load_digits()
    images = [Image.fromarray((scan * 255 / 16).round().astype(np.uint8)) for scan in handwritten.images]
    image = F.normalize(model.encode_image(torch.stack([transform(i) for i in images])), dim=-1)  # (1797, 64)
    captions = open_clip.tokenize([t.format(name) for name in NAMES for t in EVALUATED])  # (10 * 3, 77)
    text = F.normalize(model.encode_text(captions), dim=-1).view(10, len(EVALUATED), -1).mean(1)  # (10, 64)
    answer = (image @ F.normalize(text, dim=-1).T).argmax(1)
    digit = torch.from_numpy(handwritten.target)
    right = (answer == digit).float()
    print(f"zero-shot accuracy on {len(digit)} handwritten digits: {right.mean():.4f}")
    print("by class: " + ", ".join(f"{name} {right[digit == d].mean():.2f}" for d, name in enumerate(NAMES)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tclip_app/offline_clip.pt")
    out = parser.parse_args().out
    torch.set_num_threads(2)  # the order of a sum, and so its rounding, depends on it
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    save(train(), out)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB)")
    evaluate(out)
