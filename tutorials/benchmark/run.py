"""Benchmark: tclip beside other ways to learn from the same noisy pseudo-labels, several seeds each.

    python tutorials/benchmark/run.py --suite digits                          # offline
    python tutorials/benchmark/run.py --suite digits --methods tclip,GCE --seeds 5        # or all
    python tutorials/benchmark/run.py --suite digits --study                  # tclip with one thing changed
    python tutorials/benchmark/run.py --suite eurosat-gpt4v --root data       # images named by GPT-4V, for a CPU
    python tutorials/benchmark/run.py --suite cifar10-votes --root data --full            # all images, for a GPU
    python tutorials/benchmark/run.py --suite cifar10-votes --root data --teacher truth   # a ceiling
    python tutorials/benchmark/run.py --suite digits-10to1 --class-prior right            # told the classes' sizes
    python tutorials/benchmark/run.py --suite whurs19 --root data             # labels only, no training
    python tutorials/benchmark/run.py --all --root data                       # everything that a CPU can make

The suites, and whose answers they hold, are in suites.py; the methods in baselines.py. A finished run is one row of
results/SUITE.csv at once (SUITE-study.csv, SUITE-uniform.csv, SUITE-full.csv, ... for other options): an interrupted
benchmark goes on where it was when the same command is given again. A row counts for the settings that it was made
with; when these change it stays in the file, is left out of the table, and the run is done anew. After a change of code
delete the file. At the end the table of all rows that count is printed, and drawn to a picture beside the csv file.

--all does what is missing of PLAN, and says before how long that takes. Then it writes results/tables.md and makes the
pictures of the README and of the tutorials, the notebooks included.

unlabeled, held out: images that the student of the last epoch gets right, in %; labels: that the labels get right;
expected: what a run without truth would expect of unlabeled; --expected prints it against the truth, of all results.
Truth is read after a run to count what is right, and by nothing before, but where it is asked for: by --teacher truth,
and by --class-prior right, which tells tclip how many images of each class were drawn, as a user might know.
"""

import argparse
import csv
import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]  # tclip.py of this checkout, and what lies beside this file
import whurs19
from baselines import METHODS, NEED_FEATURES, STARTED, STUDY
from suites import SUITES

import tclip
from tclip import UserError
from tclip_app import outlook
from tclip_app.files import write_whole

RESULTS = HERE / "results"
ALL_METHODS = STUDY | METHODS | STARTED

OTHERS, STARTS = "ELR,SupCon + CE", "cross-entropy on tclip's start,SupCon + CE on tclip's start"
PLAN = (  # of --all: the commands whose rows are the tables of README and results, real teachers first
    "--suite eurosat-gpt4v --methods tclip,cross-entropy",
    f"--suite eurosat-gpt4v --methods '{OTHERS}' --seeds 1",
    "--suite cifar10-clip --methods tclip",
    f"--suite cifar10-clip --methods 'cross-entropy,{OTHERS}' --seeds 1",
    "--suite cifar10-clip-french --methods tclip --seeds 1",
    "--suite cifar10-votes --methods tclip",
    f"--suite cifar10-votes --methods 'cross-entropy,{OTHERS}' --seeds 1",
    "--suite whurs19",
    "--suite whurs19 --study",
    f'--suite digits --methods "tclip,cross-entropy,{OTHERS},{STARTS}"',
    "--suite digits --methods tclip --class-prior uniform",
    f'--suite digits-10to1 --methods "tclip,cross-entropy,{OTHERS},GCE,soft labels,{STARTS}"',
    "--suite digits-10to1 --methods tclip --class-prior right",
    "--suite digits-10to1 --methods tclip --class-prior uniform",
    "--suite mnist --methods tclip",
    "--suite mnist --methods tclip --class-prior uniform",
    "--suite cifar10-annotator --methods tclip",
    f"--suite cifar10-annotator --methods 'cross-entropy,{OTHERS}' --seeds 1",
    "--suite cifar10-annotator --methods tclip --class-prior uniform",
    "--suite eurosat-simulated --methods tclip --seeds 1",
    "--suite eurosat-simulated --methods tclip --seeds 1 --class-prior uniform",
    "--suite digits --study --seeds 1",
    "--suite eurosat-gpt4v --study --seeds 1 --methods 'tclip,without C3L,with fixed labels'",
    "--suite eurosat-gpt4v --study --seeds 1 --methods 'class share 0.0,class share 1.0,trust 0,without the mass'",
)

# ==== Runs and their rows =============================================================================================


def load(suite, config, count, teacher=None):
    """The Task of a suite for this config; count: so many unlabeled images, None: all. teacher "truth": a ceiling."""
    task = SUITES[suite].load(replace(config, class_prior="none"), count)  # "right" is known when it is drawn
    if teacher == "truth":
        truth = F.one_hot(task.unlabeled.truth, len(task.classes)).float()
        unlabeled, heldout = replace(task.unlabeled, probs=truth, features=None), replace(task.heldout, probs=None)
        return replace(task, teacher="the truth (a ceiling)", unlabeled=unlabeled, heldout=heldout)
    return task


def settings_of(config, task):
    """All that a row's numbers follow from but method and seed, as json: rows count as long as this is the same.

    (What a method changes is in its name.) How many images a seed draws is not part of it.
    """
    places = "dataset", "root", "clip", "cache", "seed", "device", "compile", "out"
    settings = {name: value for name, value in asdict(config).items() if name not in places}
    images = "drawn" if task.drawn else len(task.unlabeled.names)
    return json.dumps(settings | dict(teacher=task.teacher, images=images, heldout=len(task.heldout.names)))


def digest_of(settings):
    """Ten letters for settings_of()."""
    return hashlib.sha256(settings.encode()).hexdigest()[:10]


def accuracy(probs, truth):
    """Share of right answers, "" where there are none."""
    return "" if probs is None else tclip.score(probs, truth)["accuracy"]


def worst(probs, truth):
    """The accuracy of the worst class."""
    return min(share for share in tclip.score(probs, truth)["per_class"] if share is not None)


def one_run(suite, name, config, task):
    """Train a student by the method `name`, and its row of the results. UserError: its predictions are not finite."""
    unlabeled, heldout, started = task.unlabeled, task.heldout, time.perf_counter()
    told = config
    if config.class_prior == "right":
        sizes = unlabeled.truth.bincount(minlength=len(task.classes)).tolist()
        told = replace(config, class_prior=",".join(map(str, sizes)))
    student, labels = ALL_METHODS[name].run(told, unlabeled)
    seconds = time.perf_counter() - started
    probs, heldout_probs = (tclip.predict(student, part.pixels) for part in (unlabeled, heldout))
    if not probs.isfinite().all():
        raise UserError(f"{name}, seed {config.seed}: the student's predictions are not finite")
    settings = settings_of(config, task)
    return dict(
        suite=suite,
        method=name,
        seed=config.seed,
        unlabeled=accuracy(probs, unlabeled.truth),
        heldout=accuracy(heldout_probs, heldout.truth),
        worst_class=worst(probs, unlabeled.truth),
        labels=accuracy(labels, unlabeled.truth),
        expected="" if labels is None else outlook.expected_accuracy(unlabeled.probs, labels, probs),
        teacher=task.teacher,
        teacher_unlabeled=accuracy(unlabeled.probs, unlabeled.truth),
        teacher_heldout=accuracy(heldout.probs, heldout.truth),
        teacher_worst_class=worst(unlabeled.probs, unlabeled.truth),
        seconds=round(seconds, 1),
        device=torch.cuda.get_device_name() if config.device == "cuda" else config.device,
        torch=torch.__version__,
        digest=digest_of(settings),
        settings=settings,
    )


def read_rows(path):
    """Rows of the results so far, a dict of strings each."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_rows(path, rows):
    """Add rows, dicts of the same keys, to the results at `path`: whole or not at all."""
    before = [dict.fromkeys(rows[0], "") | old for old in read_rows(path)]  # of a version with fewer columns
    tclip.write_csv(draft := path.with_suffix(".part"), [*before, *rows])
    os.replace(draft, path)


def finished(path, config, task, methods):
    """The rows at `path` that count: of the present settings, by (method, seed), in the order of `methods`."""
    digest = digest_of(settings_of(config, task))
    rows = [row for row in read_rows(path) if row["digest"] == digest and row["method"] in methods]
    rows.sort(key=lambda row: (list(methods).index(row["method"]), int(row["seed"])))
    return {(row["method"], int(row["seed"])): row for row in rows}


def benchmark(path, suite, config, task, load_task, methods, seeds):
    """Do the runs that results at `path` lack: seeds are the outer loop, so that what is there can be compared.

    task: the Task of seed 0. load_task: function, config -> Task, for suites of which each seed draws images.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        config = replace(config, seed=seed)
        task = load_task(config) if seed and task.drawn else task
        done = finished(path, config, task, methods)
        for name in tqdm([name for name in methods if (name, seed) not in done], f"seed {seed}", disable=None):
            row = one_run(suite, name, config, task)
            add_rows(path, [row])
            tqdm.write(
                f"{name}, seed {seed}: {row['unlabeled']:.1%} of the unlabeled, {row['heldout']:.1%} of the held-out "
                f"images right, {row['seconds']:.0f} s"
            )


# ==== Table and picture ===============================================================================================

COLUMNS = {"unlabeled": "unlabeled", "held out": "heldout", "worst class": "worst_class", "labels": "labels"}


def mean_and_sd(values):
    """Mean and sample standard deviation, which is 0 for a single value; None where there is no value."""
    values = [float(value) for value in values if value != ""]
    return (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0) if values else None


def summarise(rows):
    """A dict for each line of the table, the teacher first: name, seeds, seconds; (mean, sd) or None a column."""
    seen = {row["seed"]: row for row in rows}.values()  # the teacher's answers, one row a seed: of one draw, all alike
    lines = [dict(name=f"teacher: {rows[0]['teacher']}", seeds=0, seconds=None)]
    for column, field in COLUMNS.items():
        lines[0][column] = mean_and_sd([row.get(f"teacher_{field}", "") for row in seen])
    for name in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == name]
        figures = {column: mean_and_sd([row[field] for row in runs]) for column, field in COLUMNS.items()}
        seconds = mean_and_sd([row["seconds"] for row in runs])[0]
        lines.append(dict(name=name, seeds=len(runs), seconds=seconds) | figures)
    return lines


def percent(figure):
    """(mean, standard deviation) in percent; "" for None."""
    if figure is None:
        return ""
    return f"{100 * figure[0]:.1f}" + (f" ± {100 * figure[1]:.1f}" if figure[1] else "")


def markdown(cells):
    """Rows of cells as a table in Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def table(lines):
    """The lines of summarise() in Markdown: percentages, mean ± standard deviation over the seeds."""
    cells = [["", *COLUMNS, "seconds", "seeds"], ["---"] * (len(COLUMNS) + 3)]
    for line in lines:
        seconds = f"{line['seconds']:.0f}" if line["seeds"] else ""
        cells.append([line["name"], *(percent(line[column]) for column in COLUMNS), seconds, line["seeds"] or ""])
    return markdown(cells)


def expectations(folder):
    """What was expected of the unlabeled images against what came true, of all results in a folder, in Markdown."""
    cells, ours = [["", "expected", "unlabeled", "mean error", "seeds"], ["---"] * 5], []
    for path in sorted(folder.glob("*.csv")):
        rows = [row for row in read_rows(path) if row.get("expected")]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [(100 * float(r["expected"]), 100 * float(r["unlabeled"])) for r in rows if r["method"] == method]
            errors = [abs(expected - right) for expected, right in own]
            ours += [errors] if method == "tclip" else []
            means = [f"{statistics.mean(column):.1f}" for column in (*zip(*own), errors)]
            cells.append([f"{path.stem}, {method}", *means, len(own)])
    if not ours:
        raise UserError(f"{folder} has no results of tclip yet that say what was expected")
    mean, worst = statistics.mean(map(statistics.mean, ours)), max(map(max, ours))
    last = f"tclip: {mean:.1f} points off in the mean of {len(ours)} files, {worst:.1f} at worst."
    return f"{markdown(cells)}\n\n{last}"


def draw(suite, lines, file):
    """Picture of the table: a bar a method for unlabeled and for held-out images, the teacher as vertical lines."""
    teacher, *methods = lines
    figure = Figure((8, 1.6 + 0.42 * len(methods)), layout="constrained")
    ax = figure.subplots()
    looks = {"unlabeled": ("#0072B2", "", "-"), "held out": ("#E69F00", "//", "--")}  # Okabe and Ito's palette
    for offset, (column, (color, hatch, style)) in zip((-0.2, 0.2), looks.items()):
        means, sds = zip(*((100 * line[column][0], 100 * line[column][1]) for line in methods))
        places = [place + offset for place in range(len(methods))]
        errors = dict(xerr=sds, capsize=2) if any(sds) else {}
        ax.barh(places, means, 0.38, color=color, hatch=hatch, edgecolor="white", label=column, **errors)
        if teacher[column]:
            ax.axvline(100 * teacher[column][0], color="black", linestyle=style, label=f"teacher, {column}")
    seeds = sorted({line["seeds"] for line in methods})
    spread = "one seed" if seeds == [1] else f"mean and standard deviation, {'-'.join(map(str, seeds))} seeds"
    ax.set_yticks(range(len(methods)), [line["name"] for line in methods])
    ax.invert_yaxis()  # the first on top
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"images right, % ({spread})")
    ax.set_ylabel("method")
    ax.set_title(f"{suite}, {teacher['name']}")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(file, dpi=120, format="png")


# ==== All tables ======================================================================================================


def kept(path):
    """The rows at `path` that were made with the settings of the last one, in the order of the methods."""
    rows, order = read_rows(path), list(METHODS | STARTED | STUDY)
    rows = [row for row in rows if row["digest"] == rows[-1]["digest"] and row["method"] in order]
    return sorted(rows, key=lambda row: (order.index(row["method"]), int(row["seed"])))


def seconds_of(path, runs):
    """What the rows at `path` foretell of runs, (method, seed) each: seconds, and how many nothing is known of."""
    rows = read_rows(path)
    of = {name: mean_and_sd([row["seconds"] for row in rows if row["method"] == name]) for name, _ in runs}
    of = {name: found or mean_and_sd([row["seconds"] for row in rows]) for name, found in of.items()}
    return sum(of[name][0] for name, _ in runs if of[name]), sum(of[name] is None for name, _ in runs)


def planned(root, results):
    """The options of each command of PLAN."""
    return [parse([*shlex.split(command), "--root", str(root), "--results", str(results)]) for command in PLAN]


def suites_of(results):
    """A dict name -> rows that count, for each csv file of PLAN that has any, but for whurs19."""
    paths = dict.fromkeys(asked(given)[1] for given in planned("", results) if given.suite != "whurs19")
    return {path.stem: rows for path in paths if (rows := kept(path))}


def overview(results):
    """Markdown: a line for each suite of PLAN that has results, with cross-entropy, the best other method, and tclip.

    Images that are right, in %: unlabeled ones, where nothing else is said.
    """
    cells = [["suite", "named by", "teacher", "cross-entropy", "best other", "tclip", "tclip, held out", "its labels"]]
    cells.append(["---"] * len(cells[0]))
    for suite, rows in suites_of(results).items():
        if suite.endswith("-study"):
            continue
        teacher, *lines = summarise(rows)
        of = {line["name"]: line for line in lines}
        others = [name for name in of if "tclip" not in name and name != "cross-entropy"]
        best = max(others, key=lambda name: of[name]["unlabeled"], default=None)
        row = [suite, rows[0]["teacher"], percent(teacher["unlabeled"])]
        row.append(percent(of["cross-entropy"]["unlabeled"]) if "cross-entropy" in of else "")
        row.append(f"{percent(of[best]['unlabeled'])} ({best})" if best else "")
        row += [percent(of["tclip"][column]) if "tclip" in of else "" for column in ("unlabeled", "held out", "labels")]
        cells.append(row)
    return markdown(cells)


def write_tables(results):
    """tables.md: the overview, and the table of each suite of PLAN."""
    text = "# Tables\n\nWritten by `run.py --all` from the csv files here; what they mean: [README.md](README.md).\n\n"
    text += overview(results) + "\n"
    for name in ("whurs19", "whurs19-study"):
        if rows := read_rows(results / f"{name}.csv"):
            text += f"\n## {name}\n\n{whurs19.table(rows)}\n"
    for suite, rows in suites_of(results).items():
        text += f"\n## {suite}\n\n{table(summarise(rows))}\n"
    write_whole(results / "tables.md", lambda file: file.write(text), "w")


def everything(root, results):
    """All runs of PLAN that are missing, and tables.md. UserError: a file is missing, before anything is done."""
    total, unknown = 0, 0
    for command, given in zip(PLAN, planned(root, results)):
        if given.suite == "whurs19":
            whurs19.read(root)
            print(f"{command}: anew, some minutes", flush=True)
            continue
        config, path, methods, known, load_task = asked(given)
        done = finished(path, config, task := load_task(config), known)
        methods = runnable(given, methods, task)
        runs = [(name, seed) for seed in range(given.seeds) for name in methods if (name, seed) not in done]
        seconds, new = seconds_of(path, runs)
        total, unknown = total + seconds, unknown + new
        print(f"{command}: {len(runs)} runs to do, {seconds / 3600:.1f} hours", flush=True)
    more = f", without {unknown} runs of which nothing is known" * bool(unknown)
    print(
        f"in all {total / 3600:.1f} hours by the seconds of the kept runs{more}; then the notebooks, some minutes each"
    )
    for command in PLAN:
        main([*shlex.split(command), "--root", str(root), "--results", str(results)])
    write_tables(results)


def other_tables(root, results):
    """Images of unknown classes; a few labels."""
    for script in ("unknown.py", "few_labels.py"):
        options = ["--root", str(root), "--results", str(results), "--seeds", "1"]
        subprocess.run([sys.executable, str(HERE / script), *options], check=True)


def draw_tutorials():
    """The pictures that README shows: of the main command, and of the notebooks, which are run."""
    with tempfile.TemporaryDirectory() as folder:
        tclip.main(["--out", f"{folder}/digits"])
        shutil.copy(f"{folder}/digits/noise.png", HERE.parent / "pictures" / "digits.png")
    subprocess.run([sys.executable, str(HERE.parent / "build.py")], check=True)


# ==== Command line ====================================================================================================


def parse(argv):
    """The options. UserError: a value is not allowed."""
    usage, _, details = __doc__.partition("\n\n")
    style = dict(epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("run.py", description=usage, **style)
    parser.add_argument("--suite", choices=[*SUITES, "whurs19"], default="digits", help="which data [digits]")
    parser.add_argument("--all", action="store_true", help="every table and picture that a CPU can make")
    parser.add_argument("--root", default="data", help="folder of the data [data]")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... [3]")
    parser.add_argument("--methods", help="names, with commas between them, or all [the suite's]")
    parser.add_argument("--study", action="store_true", help="tclip with other settings, in place of other methods")
    parser.add_argument("--full", action="store_true", help="all images and a ResNet-18, for a GPU")
    parser.add_argument("--images", type=int, help="how many unlabeled ones [the suite's]")
    parser.add_argument("--epochs", type=int, help="passes over the images [40]")
    priors = "right", "uniform", "none"
    parser.add_argument("--class-prior", choices=priors, default="none", help="what tclip is told of sizes [none]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results [results]")
    parser.add_argument("--expected", action="store_true", help="no run: what was expected, and what came true")
    parser.add_argument("--teacher", choices=("truth",), help="true labels: what can the network learn at all?")
    given = parser.parse_args(argv)
    for name in ("seeds", "images", "epochs"):
        if (value := getattr(given, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    return given


def common_options(doc, kinds):
    """The parser of a script that measures something else on some of the suites: unknown.py, few_labels.py."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data [data]")
    parser.add_argument("--suites", nargs="+", choices=kinds, default=kinds, help="which data [all]")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, ... [3]")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the images [40]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results [results]")
    return parser


def chosen(names, known):
    """The methods that are asked for, names with commas between them. UserError: there is none of that name."""
    if unknown := [name for name in names.split(",") if name not in known]:
        raise UserError(f"--methods {unknown[0]}: choose from {', '.join(known)}")
    return names.split(",")


def asked(given):
    """What the options ask for: Config, path of the rows, methods, the table they are of, function config -> Task."""
    suite, known = SUITES[given.suite], STUDY if given.study else METHODS | STARTED
    methods = list(known) if given.study else suite.methods or list(known)
    if given.methods:
        methods = list(known) if given.methods == "all" else chosen(given.methods, known)
    settings = suite.settings | (suite.full if given.full else {}) | dict(class_prior=given.class_prior)
    settings |= dict(epochs=given.epochs) if given.epochs else {}
    count = given.images or (None if given.full else suite.images)
    load_task = partial(load, given.suite, count=count, teacher=given.teacher)
    words = ["study"] * given.study + ["full"] * given.full + ["truth"] * bool(given.teacher)
    words += [given.class_prior] * (given.class_prior != "none") + [f"{given.images}"] * bool(given.images)
    path = given.results / f"{'-'.join([given.suite, *words, *[f'{given.epochs}-epochs'] * bool(given.epochs)])}.csv"
    return tclip.Config(root=given.root, **settings), path, methods, known, load_task


def runnable(given, methods, task):
    """The methods without those that need image features, where the teacher has none and nobody named them."""
    if task.unlabeled.features is None and not given.methods:
        return [name for name in methods if name not in NEED_FEATURES]
    return methods


def main(argv=None):
    """The command line."""
    given = parse(argv)
    if given.expected:
        return print(expectations(given.results))
    if given.all:
        everything(given.root, given.results)
        other_tables(given.root, given.results)
        return draw_tutorials()
    if given.suite == "whurs19":
        known = whurs19.STUDY if given.study else whurs19.METHODS
        names = chosen(given.methods, known) if given.methods else known
        rows = list(whurs19.rows(given.root, {name: known[name] for name in names}))
        given.results.mkdir(exist_ok=True)
        tclip.write_csv(given.results / f"whurs19{'-study' * given.study}.csv", rows)
        return print(whurs19.table(rows))
    config, path, methods, known, load_task = asked(given)
    task = load_task(config)
    try:
        benchmark(path, given.suite, config, task, load_task, runnable(given, methods, task), given.seeds)
    except KeyboardInterrupt:
        raise UserError("stopped. What is finished is kept: go on with the same command") from None
    lines = summarise(list(finished(path, config, task, known).values()))
    print(table(lines))
    write_whole(path.with_suffix(".png"), partial(draw, given.suite, lines))


if __name__ == "__main__":
    main()
