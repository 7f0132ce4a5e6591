"""A few labels: what is gained where the classes of 1, 3 or 10 images each are known?

    python tutorials/benchmark/few_labels.py --root data
    python tutorials/benchmark/few_labels.py --root data --suites digits --seeds 1

with all images: tclip train --labels, the labelled images beside all the others and their teacher. alone: the same
student, cross-entropy, on the labelled images, which are repeated until an epoch has as many steps. Which images are
labelled is drawn by the seed. unlabeled, labels: images that are right, of those without a label, by the student and by
what labels.csv would say; held out: by the student. A finished run is a row of results/few-labels.csv at once;
the same command goes on with what is missing there.
"""

import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # tclip.py of this checkout, and what lies beside this file
import run
from baselines import METHODS
from suites import SUITES, take

import tclip
from tclip_app.train import TrustedLabels

KINDS, COUNTS = ("digits", "eurosat-gpt4v"), (0, 1, 3, 10)
WITH, ALONE = "with all images", "alone"
COLUMNS = {"unlabeled": "unlabeled", "held out": "heldout", "labels": "labels"}


def drawn(truth, count, seed):
    """Rows, int64, of `count` images of each class."""
    order = torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[truth[order] == c][:count] for c in range(int(truth.max()) + 1)])


def with_all_images(config, images, rows):
    """Train on all images, of which some labels are known: (student, labels (N, C))."""
    trusted = torch.full_like(images.truth, -1)
    trusted[rows] = images.truth[rows]
    labels = partial(TrustedLabels, trusted=trusted)
    student, labels = tclip.train(config, images.pixels, images.probs, images.features, labels=labels)
    return student, labels.final(tclip.predict(student, images.pixels)).cpu()


def alone(config, images, rows):
    """Train on the images of which labels are known: (student, None)."""
    images = take(images, rows.repeat(len(images.names) // len(rows)))
    images = replace(images, probs=F.one_hot(images.truth, images.probs.shape[1]).float(), features=None)
    return METHODS["cross-entropy"].run(config, images)[0], None


def row_of(suite, way, count, config, task):
    """Train a student, and its row of the results."""
    images, started = task.unlabeled, time.perf_counter()
    rows = drawn(images.truth, count, config.seed)
    student, labels = {WITH: with_all_images, ALONE: alone}[way](config, images, rows)
    seconds, truth = time.perf_counter() - started, images.truth.clone()
    truth[rows] = -1
    heldout = run.accuracy(tclip.predict(student, task.heldout.pixels), task.heldout.truth)
    row = dict(suite=suite, way=way, labels_a_class=count, seed=config.seed)
    row |= dict(unlabeled=run.accuracy(tclip.predict(student, images.pixels), truth), heldout=heldout)
    return row | dict(labels=run.accuracy(labels, truth), seconds=round(seconds, 1))


def measure(path, suite, config):
    """Do what the csv file at `path` lacks, and return its rows of this suite and seed."""
    task = SUITES[suite].load(config, SUITES[suite].images)
    settings, found = run.settings_of(config, task), []
    mark = dict(digest=run.digest_of(settings), settings=settings)
    for way, count in [(WITH, 0), *((way, count) for count in COUNTS[1:] for way in (WITH, ALONE))]:
        key = dict(suite=suite, way=way, labels_a_class=str(count), seed=str(config.seed), digest=mark["digest"])
        if not any(key.items() <= row.items() for row in run.read_rows(path)):
            row = row_of(suite, way, count, config, task) | mark
            run.add_rows(path, [row])
        found += [row for row in run.read_rows(path) if key.items() <= row.items()]
    return found


def table(rows):
    """The rows in Markdown: mean and standard deviation over the seeds, in %."""
    cells = [["", "labels a class", "", *COLUMNS, "seeds"], ["---"] * (len(COLUMNS) + 4)]
    for kind in dict.fromkeys((row["suite"], row["labels_a_class"], row["way"]) for row in rows):
        own = [row for row in rows if (row["suite"], row["labels_a_class"], row["way"]) == kind]
        texts = [run.percent(run.mean_and_sd([row[name] for row in own])) for name in COLUMNS.values()]
        cells.append([*kind, *texts, len(own)])
    return run.markdown(cells)


def main(argv=None):
    """The command line."""
    parser = run.common_options(__doc__, KINDS)
    given, rows = parser.parse_args(argv), []
    given.results.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for suite in given.suites:
            settings = SUITES[suite].settings | dict(epochs=given.epochs, seed=seed, root=given.root, device="cpu")
            rows += measure(given.results / "few-labels.csv", suite, tclip.Config(**settings))
    print(table(rows))


if __name__ == "__main__":
    main()
