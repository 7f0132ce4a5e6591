"""None of these? How typical an image is for the class that the student gives it."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import tclip
from tclip_app import answers
from tclip_app.files import load_model, write_whole

SHRINKAGE = 0.1  # share of the covariance that is the same in all directions
RANK = 64  # directions of it that are kept: a model.pt stays small
FOLDS = 5


class Familiarity(nn.Module):
    """Features and the class that is given (B,) -> the share of the training images that are less typical (B,).

    Features are the student's before its classifier, of length one (B, D). The less typical they are, the larger is
    their Mahalanobis distance to the mean of the class, with one covariance for all classes (Lee et al. 2018): shrunk
    towards a multiple of the identity, and equal to one outside its 64 largest directions.
    """

    def __init__(self, classes, width):
        super().__init__()
        self.register_buffer("means", torch.zeros(classes, width))
        self.register_buffer("directions", torch.zeros(min(width, RANK), width))
        self.register_buffer("floor", torch.ones(()))
        self.register_buffer("quantiles", torch.zeros(1001))  # of the training images' distances

    def fit(self, features, given):
        """Take these as the training images; returns their distances (N,).

        An image is compared with the other four fifths of all, as a new one will be with all: its own part in mean and
        covariance would make it more typical than new images are.
        """
        fold = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)) % FOLDS
        distances = torch.zeros(len(features))
        for mine in (fold == part for part in range(FOLDS)):
            self.estimate(features[~mine], given[~mine])
            distances[mine] = self.distances(features[mine], given[mine])
        self.estimate(features, given)
        ranks = torch.linspace(0, len(features) - 1, len(self.quantiles)).round().long()
        self.quantiles = distances.sort().values[ranks]
        return distances

    def estimate(self, features, given):
        """Means and covariance of these images, the latter as floor x (1 - directions' x directions)^-1."""
        members = F.one_hot(given, len(self.means)).float()  # (N, C)
        counts = members.sum(0)[:, None]  # (C, 1)
        self.means = torch.where(counts > 0, members.T @ features / counts.clamp_min(1), features.mean(0))
        beside = features - self.means[given]
        covariance = beside.T @ beside / max(len(beside), 1)  # (D, D)
        self.floor = SHRINKAGE * covariance.diagonal().mean().clamp_min(1e-6)
        variances, directions = (x[..., -RANK:] for x in torch.linalg.eigh(covariance))  # (64,), (D, 64)
        variances = (1 - SHRINKAGE) * variances.clamp_min(0) + self.floor
        self.directions = (directions * (1 - self.floor / variances).sqrt()).T

    def distances(self, features, given):
        beside = features - self.means[given]
        return (beside.square().sum(1) - (beside @ self.directions.T).square().sum(1)) / self.floor

    def forward(self, features, given):
        return (self.quantiles > self.distances(features, given)[:, None]).float().mean(1)


def with_features(student):
    """A copy of the student that gives logits (B, C) and, in place of its embeddings, unit features (B, D)."""
    student = copy.deepcopy(student)
    student.projector = nn.Identity()
    return student


def predict(student, pixels):
    """Probabilities (N, C), as by tclip.predict(), and unit features (N, D), float32 on the CPU."""
    rows, student = [], with_features(student)
    student.register_forward_hook(lambda module, x, results: rows.append(results[1].cpu()))
    probs = tclip.predict(student, pixels)
    return probs, torch.cat(rows)


def add_to_run(run, probs, features):
    """Keep what is typical of a run's images in its model.pt, and add a column `familiar` to its labels.csv.

    probs, features: of predict().
    """
    familiarity, given = Familiarity(probs.shape[1], features.shape[1]), probs.argmax(1)
    distances = familiarity.fit(features, given)
    model = load_model(run / "model.pt") | dict(familiarity=familiarity.state_dict())
    write_whole(run / "model.pt", lambda draft: torch.save(model, draft))
    shares = (distances.argsort(descending=True).argsort() / len(distances)).tolist()
    rows = [row | dict(familiar=share) for row, share in zip(answers.read_csv(run / "labels.csv"), shares)]
    tclip.write_csv(run / "labels.csv", rows)


def load_familiarity(path):
    """The Familiarity in a model.pt; None where there is none, as after python tclip.py. UserError: it is no such."""
    model = load_model(path)
    if "familiarity" not in model:
        return None
    familiarity = Familiarity(*model["familiarity"]["means"].shape)
    familiarity.load_state_dict(model["familiarity"])
    return familiarity
