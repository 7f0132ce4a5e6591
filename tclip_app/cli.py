"""The command line: tclip train, predict, report, export.

tclip train photos --classes "cat,dog,neither"           CLIP names the images, a student learns
tclip train photos --pseudo-labels answers.csv           another teacher in place of CLIP
tclip train --resume runs/photos                         go on where a run was interrupted
tclip predict more --model runs/photos/model.pt          name new images by the student, without CLIP
tclip report runs/photos                                 write report.html again, of any run
tclip export runs/photos/model.pt                        as model.onnx and model.safetensors
"""

import argparse
import os
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import matplotlib

import tclip
from tclip import UserError, setting
from tclip_app import familiarity, files, fonts, images, report, train
from tclip_app.names import plain


@dataclass
class Prediction:
    """The settings of tclip predict."""

    root: str = setting(None, "folder of images, or one image")
    dataset: str = setting(None, "name for the results")
    model: str = setting(None, "model.pt of a run")
    out: str = setting(None, "folder of the results [runs/predict-IMAGES, or the next free one]")
    unknown: float = setting(0.0, "call images unknown that are less familiar; 0.02: than 98 of 100 others", (0, 1))
    device: str = setting(tclip.DEVICES[0], "where to compute", tclip.DEVICES)
    strict: bool = setting(False, "stop at the first file that is no readable image")
    memory: float = setting(8.0, "gigabytes of pixels that are held in memory; more lie in a file", (0, 1e6))

    __post_init__ = tclip.Config.__post_init__


ONE_LINE = partial(argparse.RawTextHelpFormatter, max_help_position=42, width=160)  # for each setting


def main(argv=None):
    """The command line. UserError, a SystemExit: one line says what the user can mend."""
    parser = argparse.ArgumentParser("tclip", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, usage):
        return commands.add_parser(name, help=help, usage=f"tclip {name} {usage}", formatter_class=ONE_LINE)

    begin = command("train", "train a student on a folder of images", "FOLDER [--setting value ...]")
    path = os.path.expanduser  # a shell does not expand the ~ of --resume=~/run
    begin.add_argument("root", nargs="?", default=argparse.SUPPRESS, type=path, metavar="FOLDER", help="of the images")
    begin.add_argument("--resume", metavar="RUN", type=path, help="go on with the interrupted run in this folder")
    tclip.add_settings(begin.add_argument_group("images, classes, teacher"), train.OWN)
    tclip.add_settings(begin.add_argument_group("method"), train.METHOD)
    name = command("predict", "name images by a student", "FOLDER --model MODEL.pt [--setting value ...]")
    name.add_argument("root", type=path, metavar="FOLDER", help="of images, or one image")
    tclip.add_settings(name, fields(Prediction)[2:])
    command("report", "write report.html of a run", "RUN").add_argument("run", type=path, help="its folder")
    name = command("export", "write a student as ONNX and safetensors", "MODEL.pt")
    name.add_argument("model", type=path, help="of a run")

    sys.stderr = sys.stderr or open(os.devnull, "w")  # where it is closed, a progress bar would fail
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if value == "":  # of a shell variable that is not set
            raise UserError(f"{name.replace('root', 'FOLDER').replace('_', '-')} is empty")
    actions = dict(train=train_command, predict=predict_command, report=report_command, export=export_command)
    try:
        actions[given.pop("command")](**given)
    except KeyboardInterrupt:
        raise UserError("stopped") from None
    except UserError as error:
        raise UserError(" ".join(str(error).splitlines())) from error  # a file's name may have more


def say(line):
    """Print, in whatever encoding stdout has; and where nobody reads any more, nothing: all is written by then."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        sys.stdout = None  # else Python tries once more when it ends


def train_command(resume, **given):
    config = train.resume(resume, given) if resume else train.begin(given)
    train.check_cache(config)
    with matplotlib.rc_context(fonts.settings_for(config.classes.split("\n")) if config.truth else {}):
        summary = train.run(config, resumed=bool(resume))
    if not summary:  # the first process speaks
        return
    page = report.write_report(summary["out"])
    before, after = (summary[f"unlabeled_{who}_accuracy"] for who in ("teacher", "student"))
    if before is None:
        say(f"student and teacher agree on {summary['agreement']:.1%} of {summary['images']} images")
        say(summary["outlook"])
    else:
        say(f"of the images whose class is known are right: teacher {before:.1%}, student {after:.1%}")
    for warning in summary["warnings"]:
        images.tell(f"look at the results with care: {warning}")
    say(f"{summary['seconds']:.0f} s on {summary['device']}; results in {summary['out']}, to look at: {page}")


def predict_command(root, **given):
    if "model" not in given:
        raise UserError("tclip predict needs the model.pt of a run: --model runs/photos/model.pt")
    path = Path(os.path.abspath(root))  # a link to an image is followed where it is what was named
    config = Prediction(root=str(path), dataset=f"predict-{path.stem if path.is_file() else path.name}", **given)
    images.find(path)
    (student, classes), typical = files.load_student(config.model), familiarity.load_familiarity(config.model)
    if config.unknown and not typical:
        images.tell(f"{config.model}, of tclip.py, does not hold what is familiar: no image is called unknown")
    if config.unknown and "unknown" in map(plain, classes):
        raise UserError("--unknown: a class is called so already")
    student.to(config.device)
    files.check_folder(config.out or "runs")
    out = Path(tclip.claim_folder(config))
    names, pixels, _ = images.read_folder(path, student.size, out, config.memory, config.strict)
    rows, (probs, features) = [], familiarity.predict(student, pixels)
    for name, shares, numbers in zip(names, *probs.topk(min(3, len(classes)))):
        rows.append(dict(file=name))
        for suffix, share, number in zip(("", "_2", "_3"), shares.tolist(), numbers.tolist()):
            rows[-1] |= {f"label{suffix}": classes[number], f"confidence{suffix}": f"{share:.4f}"}
    for row, share in zip(rows, typical(features, probs.argmax(1)).tolist() if typical else []):
        row |= dict(familiar=f"{share:.3f}") | (dict(label="unknown") if share < config.unknown else {})
    tclip.write_csv(out / "predictions.csv", rows)
    say(f"wrote {out / 'predictions.csv'}")


def report_command(run):
    say(f"wrote {report.write_report(files.run_folder(run))}")


def export_command(model):
    try:
        from tclip_app import export
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] not in ("onnxscript", "onnx", "onnx_ir", "safetensors"):
            raise
        raise UserError(f'export needs {error.name}: pip install "tclip[export]"') from error
    student, classes = files.load_student(model)
    written = export.export_student(student, classes, files.model_file(model), familiarity.load_familiarity(model))
    say(f"wrote {' and '.join(map(str, written))}")
