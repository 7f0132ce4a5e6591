"""A simulated annotator of EuroSAT that sees well and names badly. It is no CLIP, and stands for none."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tclip
from tclip_app.files import write_whole

BENT = {  # class: (a similar one, towards which its prototype is moved, and how far; it then takes images of that)
    "AnnualCrop": ("Pasture", 0.5),
    "Forest": ("SeaLake", 0.05),
    "HerbaceousVegetation": ("Pasture", 0.55),
    "Highway": ("River", 0.6),
    "Industrial": ("Residential", 0.2),
    "Pasture": ("HerbaceousVegetation", 0.5),
    "PermanentCrop": ("HerbaceousVegetation", 0.65),
    "Residential": ("Industrial", 0.1),
    "River": ("SeaLake", 0.55),
    "SeaLake": ("Forest", 0.2),
}


def simulated_annotator(images, classes, root, labeled=9000, epochs=24):
    """Rows of unlabeled and of held-out images, int64 (n,), and what the annotator says of all images, (N, C).

    images: all of EuroSAT, with truth. A network is trained on `labeled` of four fifths of them. Its classes are named
    by prototypes, the mean unit features of each, as CLIP's are by the embeddings of prompts; and each prototype is
    moved towards another, similar class (BENT), as if the prompt were ill chosen. So images of a class lie together,
    and whole classes are misnamed. The table was found by trying many, with the truth in view, for about 60 % right
    answers: some classes nearly always right, some nearly never, and none just renamed into another and back, which
    nobody could tell without labels. The temperature makes the mean confidence what the accuracy is, on a fifth of the
    labeled images that was not learned from. Answers are kept in ROOT: another machine may round otherwise.
    """
    from sklearn.model_selection import train_test_split

    def split(rows, size):  # both parts as tensors
        parts = train_test_split(rows.tolist(), test_size=size, stratify=images.truth[rows], random_state=0)
        return map(torch.tensor, parts)

    rest, heldout = split(torch.arange(len(images.truth)), 0.2)
    unlabeled, labeled = split(rest, labeled)
    learned, calibration = split(labeled, 0.2)
    kept = Path(root, f"eurosat_annotator_{images.pixels.shape[-1]}px.npz")
    if not kept.exists():
        settings = dict(arch="resnet8", views="overhead", epochs=epochs, label_momentum=1.0, c3l_weight=0.0)
        truth = F.one_hot(images.truth, len(classes)).float()
        network, _ = tclip.train(tclip.Config(device="cpu", **settings), images.pixels[learned], truth[learned])
        network.classifier = torch.nn.Identity()  # now it answers with its features
        with torch.inference_mode():
            batches = images.pixels.split(1024)
            features = torch.cat([F.normalize(network(x.float() / 255)[0], dim=1) for x in batches])  # (N, D)
        means = torch.stack([features[learned[images.truth[learned] == c]].mean(0) for c in range(len(classes))])
        scores = features @ bend(F.normalize(means, dim=1), classes).T  # (N, C), cosines
        temperature = calibrated_temperature(scores[calibration], images.truth[calibration])
        answers = (scores / temperature).softmax(1).numpy()
        write_whole(kept, lambda draft: np.savez(draft, probs=answers))
    with np.load(kept) as arrays:
        probs = torch.from_numpy(arrays["probs"])
    return unlabeled, heldout, probs


def bend(prototypes, classes):
    """Unit rows (C, D), each moved towards that of another class by BENT and made unit again."""
    partners = [classes.index(BENT[name][0]) for name in classes]
    share = torch.tensor([[BENT[name][1]] for name in classes])  # (C, 1)
    return F.normalize((1 - share) * prototypes + share * prototypes[partners], dim=1)


def calibrated_temperature(scores, truth):
    """The temperature at which softmax(scores / temperature) is on average as confident as it is right."""
    accuracy = tclip.score(scores, truth)["accuracy"]
    low, high = 1e-4, 1e2  # the confidence falls as the temperature rises: halve, on a scale of ratios
    for _ in range(50):
        middle = (low * high) ** 0.5
        confident = (scores / middle).softmax(1).amax(1).mean() > accuracy
        low, high = (middle, high) if confident else (low, middle)
    return middle
