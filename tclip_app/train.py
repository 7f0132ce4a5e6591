"""A run on a folder of images: its settings, and what tclip.run() is given to read."""

import atexit
import json
import os
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tclip
from tclip import UserError, setting
from tclip_app import answers, familiarity, images, networks, outlook
from tclip_app.files import check_folder, load, run_folder, write_whole
from tclip_app.names import class_numbers


@dataclass
class Settings(tclip.Config):
    """The settings of a run on a folder of images, `root`; `dataset` is its name. Classes and prompts: one a line."""

    classes: str = setting(None, "names of the classes: separated by commas, or a text file with one a line")
    templates: str = setting(None, 'prompt with {} for the class, or a file of prompts ["a photo of a {}.", and "the"]')
    pseudo_labels: str = setting(None, "another teacher's answers: .csv (file,label[,confidence]) or .npz, see README")
    labels: str = setting(None, "labels that are right, of some images: csv file (file,label), or the word folders")
    truth: str = setting(None, "csv file (file,label), or the word folders; for evaluation alone")
    strict: bool = setting(False, "stop at the first file that is no readable image")
    memory: float = setting(8.0, "gigabytes of pixels that are held in memory; more lie in a file", (0, 1e6))
    size: int = setting(None, "side of the student's images, in pixels [32, 64, 96 or 128, by theirs]", (8, 1024))
    clip: str = setting(
        "ViT-B/32", "teacher: OpenAI's, offline, arch:tag or arch:FILE; better: ViT-B-32:datacomp_xl_s13b_b90k"
    )
    arch: str = setting("resnet18", "student: resnet8, a resnet of torchvision, or timm:NAME, any network of timm")
    pretrained: bool = setting(False, "the student begins with timm's weights, which are downloaded, not from scratch")
    out: str = setting(None, "folder of the results [runs/FOLDER, or the next free runs/FOLDER-2, ...]")


ALL = {f.name: f for f in fields(Settings)}
OWN = [ALL[name] for name in ("classes", "templates", "pseudo_labels", "labels", "truth", "size", "strict", "memory")]
METHOD = [f for f in ALL.values() if f not in OWN and f.name not in ("dataset", "root")]
PLACES = {"root", "cache", "device", "memory", "pseudo_labels", "labels", "truth"}  # that say where, not what


def run(config, resumed):
    """A whole run on a folder of images. Returns the summary, a dict, of the first process."""
    classes, read_images, learned = config.classes.split("\n"), [], []
    pretrained = config.pretrained and not (resumed and Path(config.out, "checkpoint.pt").exists())
    torch.manual_seed(config.seed)
    student = networks.build(config.arch, len(classes), config.size, pretrained)  # what is wrong is told before reading

    def read_once(config):
        read_images.append(read(config)[0])
        return read_images[0], None, classes

    def learn(*tables):
        labels = partial(TrustedLabels, trusted=read_images[0].trusted)
        learned[:] = tclip.train(*tables, student=student, labels=labels)
        return learned

    if summary := tclip.run(config, read_once, resumed, learn):
        out, (probs, features) = Path(summary["out"]), familiarity.predict(student, read_images[0].pixels)
        labels = learned[1].final(probs).cpu()  # those of labels.csv
        familiarity.add_to_run(out, probs, features)
        summary |= outlook.summary(read_images[0].probs, labels, probs, classes)
        write_whole(out / "summary.json", partial(json.dump, summary, indent=1), "w")
    return summary


@dataclass
class Images(tclip.Images):
    """The images of a folder."""

    trusted: torch.Tensor = None  # int64 (N,), labels that training may know to be right; -1 where there is none


class TrustedLabels(tclip.EnsembleLabels):
    """EnsembleLabels of which some are known to be right: they stay, and are what is said of these images.

    trusted: int64 (N,), class numbers, -1 for images whose class is not known. Known ones are certain answers to
    tclip.verdict(), too: where they are many, it believes the others less.
    """

    def __init__(self, probs, *settings, trusted):
        self.trusted = trusted.to(probs.device)
        super().__init__(self.corrected(probs, slice(None)), *settings)
        self.register_buffer("trusted", self.__dict__.pop("trusted"))  # a run that goes on knows what it knew
        for labels in (self.answers, self.table):  # known shares of the classes have moved them
            labels.copy_(self.corrected(labels, slice(None)).clamp_min(1e-6))

    def corrected(self, labels, index):
        """The labels (B, C) of the images `index`, with those that are known in place."""
        known = self.trusted[index, None]  # (B, 1)
        return torch.where(known < 0, labels, F.one_hot(known[:, 0].clamp_min(0), labels.shape[1]).to(labels))

    def update(self, index, said, places):
        super().update(index, self.corrected(said, index), places)
        self.table[index] = self.corrected(self.table[index], index).clamp_min(1e-6)

    def final(self, predictions):
        predictions = self.corrected(predictions.to(self.table.device), slice(None))
        return self.corrected(super().final(predictions), slice(None))


def begin(given):
    """The Settings of a new run, of those that are given; `root` is one. UserError: something does not fit."""
    given = absolute(given)
    if "root" not in given:
        raise UserError("tclip train needs a folder of images, or --resume RUN")
    root = Path(given["root"])
    images.find(root)
    check_effect(given)
    classes = answers.listed(given["classes"], ",") if "classes" in given else None
    if classes and len(classes) < 2 and not os.path.isfile(given["classes"]):
        raise UserError(f"--classes {classes[0]}: there is no such file, and of classes two are needed at least")
    if "pseudo_labels" in given:
        classes = answers.read_pseudo_labels(given["pseudo_labels"], classes)[1]
    if not classes:
        raise UserError('tclip train needs the names of the classes: --classes "cat,dog"')
    class_numbers([], classes, "--classes")
    prompts = answers.listed(given["templates"]) if "templates" in given else ["a photo of a {}.", "a photo of the {}."]
    if not all("{}" in prompt for prompt in prompts):
        raise UserError('--templates: no such file, or a prompt without {} for the class, as in "a photo of a {}."')
    given |= dict(class_prior=answers.class_prior(given.get("class_prior", "none"), classes))
    out = given.get("out", "runs")
    check_folder(out)
    if Path(out).resolve().is_relative_to(root):
        raise UserError(f"the results would lie among the images in {root}: choose another --out")
    given |= dict(dataset=root.stem if root.is_file() else root.name)
    given |= dict(classes="\n".join(classes), templates="\n".join(prompts))
    return Settings(**dict(size=given.get("size") or images.usual_size(root)) | given)


def check_effect(given):
    """UserError: a setting is given that has no effect beside the others."""
    for useless, why, names in (
        ("pseudo_labels" in given, "beside --pseudo-labels", ("clip", "templates", "cache")),
        (given.get("label_momentum") == 1, "with --label-momentum 1", ("label_neighbours",)),
        (given.get("c3l_weight") == 0, "with --c3l-weight 0", ("temperature", "class_share")),
    ):
        if useless and (idle := [name for name in names if name in given]):
            raise UserError(f"--{idle[0].replace('_', '-')} has no effect {why}: leave it out")


def check_cache(config):
    """UserError: there is no place for CLIP's features."""
    if not config.pseudo_labels and config.cache != "none":
        check_folder(config.cache, "; choose another --cache, or none")


def resume(run, given):
    """The Settings of the run in that folder, which goes on; where things lie may be given anew.

    run: the folder, or a file in it. UserError: other settings are given, there is no such run, or its checkpoint is
    damaged.
    """
    run = str(run_folder(run))
    if fixed := given.keys() - PLACES:
        raise UserError(f"--resume takes --{min(fixed).replace('_', '-')} from {run}/config.json: leave it out")
    try:
        begun = json.loads(Path(run, "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {run}: no run that has begun, its config.json cannot be read: {error}") from error
    if not isinstance(begun, dict) or begun.keys() != ALL.keys():
        raise UserError(f"--resume {run}: its config.json is of another command or version")
    if Path(run, "checkpoint.pt").exists():
        state = load(Path(run, "checkpoint.pt"), "student", "optimizer", "labels", "history")
        kept = TrustedLabels(torch.ones(2, 2), trusted=torch.tensor([-1, -1])).state_dict()
        if state["labels"].keys() != kept.keys():
            raise UserError(f"--resume {run}: its checkpoint.pt is of another version")
    check_folder(run)
    return Settings(**begun | absolute(given) | dict(out=run))


def absolute(given):
    """The settings with whole paths: a run can go on from another folder."""
    places = [name for name in ("root", "pseudo_labels", "labels", "truth") if given.get(name) not in (None, "folders")]
    return given | {name: os.path.abspath(given[name]) for name in places}


def read(config):
    """What tclip.run() trains on: (Images, None, class names). The first process reads, the others take it over."""
    out, classes = Path(config.out), config.classes.split("\n")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1 and dist.get_rank() > 0:
        return taken_over(config), None, classes
    if config.pseudo_labels:
        features, said = None, answers.read_pseudo_labels(config.pseudo_labels, classes)
    else:
        clip = tclip.Clip(config.clip, config.device)
        whole_texts(clip, classes, config.templates.split("\n"))
        prompts = tclip.text_classifier(clip.encode_texts, classes, config.templates.split("\n"))  # (C, D)
        features = images.KeptFeatures(clip, images.features_file(config.cache, config.dataset, clip.name))
    how = dict(memory=config.memory, strict=config.strict, as_file=world > 1)
    names, pixels, rows = images.read_folder(config.root, config.size, out, features=features, **how)
    same_images(config, names)
    if config.pseudo_labels:
        probs, rows = answers.match(names, said[0], said[2], said[3])
    else:
        probs = tclip.zero_shot_probs(rows, prompts, clip.temperature)
    answers.tell_unsaid(probs, classes)
    truth = answers.read_truth(config.truth, names, classes)
    trusted = answers.read_truth(config.labels, names, classes, "--labels")
    truth[trusted >= 0] = -1  # what training knows is no matter of evaluation
    if world > 1:
        tables = dict(probs=probs, truth=truth, trusted=trusted) | (dict() if rows is None else dict(features=rows))
        shared = out / "shared.npz"
        atexit.register(shared.unlink, missing_ok=True)
        write_whole(shared, lambda draft: np.savez(draft, **tables))
    return Images(names, pixels, truth, probs, rows, trusted), None, classes


def whole_texts(clip, classes, prompts):
    """Tell of which classes CLIP does not read the prompts to their ends. UserError: two are one class to it."""
    cut, seen = [], {}
    for name in classes:
        texts = [prompt.replace("{}", name) for prompt in prompts]
        tokens = clip.tokenize(texts)  # (P, 77)
        if (tokens == clip.tokenize([text + " and more" for text in texts])).all(1).any():  # which makes no difference
            cut.append(name)
        if (other := seen.setdefault(tuple(tokens.flatten().tolist()), name)) != name:
            raise UserError(f"to CLIP, which reads {tokens.shape[1]} tokens, {other!r} and {name!r} are the same text")
    if cut:
        images.tell(f"CLIP reads {tokens.shape[1]} tokens, and not the ends of {len(cut)} classes, such as {cut[0]!r}")


def same_images(config, names):
    """Note the images, and where they lie by now, in the run's folder. UserError: it began with other ones."""
    file = Path(config.out, "images.json")
    if file.exists():
        before, now = set(json.loads(file.read_text(encoding="utf-8"))), set(names)
        for others, what in ((before - now, "are gone or unreadable"), (now - before, "are new")):
            if others:
                raise UserError(
                    f"{config.out} began with other images than {config.root} holds: {len(others)} {what}, such as "
                    f"{min(others)}. Begin a new run, or give the folder: tclip train FOLDER --resume {config.out}"
                )
    write_whole(file, partial(json.dump, names), "w")
    write_whole(file.with_name("config.json"), partial(json.dump, asdict(config), indent=1), "w")


def taken_over(config):
    """The Images that the first process has read."""
    out = Path(config.out)
    names = json.loads((out / "images.json").read_text(encoding="utf-8"))
    with np.load(out / "shared.npz", allow_pickle=False) as tables:
        tables = {name: torch.from_numpy(table) for name, table in tables.items()}
    return Images(names, images.map_pixels(out, (len(names), 3, config.size, config.size)), **tables)
