"""None of these: does a student tell images of classes that it does not know?

    python tutorials/benchmark/unknown.py --root data
    python tutorials/benchmark/unknown.py --root data --suites digits --seeds 1

A student is trained as by run.py. Known are held-out images of its classes, unknown are

digits          500 letters in matplotlib's fonts, without those that look like a digit; 500 pieces of the two sample
                photos of scikit-learn; 500 images of noise
eurosat-gpt4v,  the held-out images of two classes, drawn by the seed, that are left out: of the unlabeled images, the
cifar10-votes   names, and the teacher's answers, which are divided among the others

AUROC: the chance that of a known and an unknown image the known one scores higher, in %, of familiarity, beside the
largest probability and the energy, log sum exp of the logits (Liu et al. 2020). known, unknown called so: the share of
each that `tclip predict --unknown 0.02` calls unknown. A finished training is its rows of results/unknown.csv at once;
the same command goes on with what is missing there.
"""

import string
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # tclip.py of this checkout, and what lies beside this file
import run
from suites import SUITES, take

import tclip
from tclip_app.familiarity import Familiarity, with_features

LETTERS = sorted(set(string.ascii_letters) - set("BDIOQSZbgijloqsz"))  # without those that look like a digit
FONTS = "DejaVuSans*.ttf", "DejaVuSerif*.ttf", "STIXGeneral*.ttf", "cmr10.ttf", "cmb10.ttf", "cmss10.ttf", "cmtt10.ttf"
KINDS = "digits", "eurosat-gpt4v", "cifar10-votes"
SCORES = {"familiarity": "familiarity", "largest probability": "probability", "energy": "energy"}
N, LIMIT = 500, 0.02


# ==== Images of no class ==============================================================================================


def letters(size, rng):
    """Letters as scikit-learn's digits are: white on black, 8 x 8 pixels that they fill. uint8 (N, 3, size, size)."""
    folder = Path(matplotlib.get_data_path(), "fonts/ttf")
    fonts = [ImageFont.truetype(file, 64) for pattern in FONTS for file in sorted(folder.glob(pattern))]
    images = []
    for letter, font in zip(rng.choice(LETTERS, N), rng.choice(len(fonts), N)):
        large = Image.new("L", (128, 128))
        ImageDraw.Draw(large).text((64, 64), letter, 255, fonts[font], "mm")
        letter = large.crop(large.getbbox())
        square = Image.new("L", (max(letter.size),) * 2)
        square.paste(letter, ((square.width - letter.width) // 2, (square.height - letter.height) // 2))
        images.append(tclip.square(square.resize((8, 8), Image.Resampling.BOX), size))
    return torch.stack(images)


def photos(size, rng):
    """Square pieces of two photos. uint8 (N, 3, size, size)."""
    pieces, sources = [], load_sample_images().images
    for source, side in zip(rng.choice(2, N), rng.integers(32, 200, N)):
        top, left = (rng.integers(length - side) for length in sources[source].shape[:2])
        pieces.append(tclip.square(Image.fromarray(sources[source][top : top + side, left : left + side]), size))
    return torch.stack(pieces)


def noise(size, rng):
    """uint8 (N, 3, size, size)"""
    return torch.from_numpy(rng.integers(0, 256, (N, 3, size, size), np.uint8))


def left_out(task, seed):
    """The Task without two of its classes, their names, and their held-out images, uint8 (n, 3, S, S)."""
    order = torch.randperm(len(task.classes), generator=torch.Generator().manual_seed(seed))
    kept = order[2:].sort().values
    number = torch.full((len(order),), -1)
    number[kept] = torch.arange(len(kept))

    def known(images):
        probs = None if images.probs is None else F.normalize(images.probs[:, kept] + 1e-6, p=1, dim=1)
        images = replace(images, truth=number[images.truth], probs=probs)
        return take(images, (images.truth >= 0).nonzero()[:, 0])

    others = task.heldout.pixels[number[task.heldout.truth] < 0]
    parts = dict(unlabeled=known(task.unlabeled), heldout=known(task.heldout))
    names = [task.classes[c] for c in order[:2]]
    return replace(task, classes=[task.classes[c] for c in kept], **parts), names, others


# ==== Measurement =====================================================================================================


@torch.inference_mode()
def outputs(student, pixels):
    """Logits (N, C) and unit features (N, D)."""
    student = with_features(student).eval()
    return map(torch.cat, zip(*(student(x.float() / 255) for x in pixels.split(256))))


def scores(student, familiarity, pixels):
    """dict of three scores of each image, (N,): known images should have the higher ones."""
    logits, features = outputs(student, pixels)
    familiar, sure = familiarity(features, logits.argmax(1)), logits.softmax(1).amax(1)
    return dict(familiarity=familiar, probability=sure, energy=logits.logsumexp(1))


def rows_of(suite, config, task):
    """Train a student: a row for each kind of unknown images."""
    if suite == "digits":
        rng = np.random.default_rng(config.seed)
        names, unknown = [], {draw.__name__: draw(config.size, rng) for draw in (letters, photos, noise)}
    else:
        task, names, others = left_out(task, config.seed)
        unknown = {"two classes": others}
    started, pixels = time.perf_counter(), task.unlabeled.pixels
    student, _ = tclip.train(config, pixels, task.unlabeled.probs, task.unlabeled.features)
    seconds = time.perf_counter() - started
    logits, features = outputs(student, pixels)
    familiarity = Familiarity(logits.shape[1], features.shape[1])
    familiarity.fit(features, logits.argmax(1))
    known = scores(student, familiarity, task.heldout.pixels)
    right = run.accuracy(tclip.predict(student, task.heldout.pixels), task.heldout.truth)
    for kind, images in unknown.items():
        strange = scores(student, familiarity, images)
        row = dict(suite=suite, unknown=kind, left_out=", ".join(names), seed=config.seed)
        for name, values in known.items():
            truth = [1] * len(values) + [0] * len(images)
            row[name] = roc_auc_score(truth, torch.cat([values, strange[name]]))
        row |= {f"{who}_called_unknown": (values["familiarity"] < LIMIT).float().mean().item()
                for who, values in (("known", known), ("unknown", strange))}  # fmt: skip
        yield row | dict(heldout=right, seconds=round(seconds, 1))


def measure(path, suite, config, images):
    """Add the rows of this training to the csv file at `path`, where they are missing, and return them."""
    task = SUITES[suite].load(config, images)
    settings = run.settings_of(config, task)
    mark = dict(digest=run.digest_of(settings), settings=settings)

    def found():
        key = suite, str(config.seed), mark["digest"]
        return [row for row in run.read_rows(path) if (row["suite"], row["seed"], row["digest"]) == key]

    if not found():
        rows = [row | mark for row in rows_of(suite, config, task)]
        run.add_rows(path, rows)
    return found()


def table(rows):
    """The rows in Markdown, means over the seeds in %, and the mean of these."""
    cells = [["", *SCORES, "known called so", "unknown called so", "seeds"], ["---"] * (len(SCORES) + 4)]
    columns, means = [*SCORES.values(), "known_called_unknown", "unknown_called_unknown"], []
    for kind in dict.fromkeys((row["suite"], row["unknown"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["unknown"]) == kind]
        means.append([np.mean([100 * float(row[name]) for row in own]) for name in columns])
        cells.append([", ".join(kind), *(f"{mean:.1f}" for mean in means[-1]), len(own)])
    cells.append(["mean", *(f"{mean:.1f}" for mean in np.mean(means, 0)), ""])
    return run.markdown(cells)


def main(argv=None):
    """The command line."""
    parser = run.common_options(__doc__, KINDS)
    parser.add_argument("--images", type=int, help="how many unlabeled ones [the suite's]")
    given, rows = parser.parse_args(argv), []
    given.results.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for suite in given.suites:
            settings = SUITES[suite].settings | dict(epochs=given.epochs, seed=seed, root=given.root, device="cpu")
            images = given.images or SUITES[suite].images
            rows += measure(given.results / "unknown.csv", suite, tclip.Config(**settings), images)
    print(table(rows))


if __name__ == "__main__":
    main()
