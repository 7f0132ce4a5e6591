"""How familiar images are: what the share means, and what the commands make of it."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rows_of
from PIL import Image

import tclip
from tclip_app.cli import main
from tclip_app.familiarity import SHRINKAGE, Familiarity


def drawn(n, seed):
    """Features of two classes, spread widely in their first direction and little in the others, and the classes."""
    noise = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed)) * torch.tensor([3.0] + 19 * [0.3])
    classes = torch.arange(n) % 2
    return noise + 4 * F.one_hot(classes + 1, 20), classes


def test_familiarity():
    """New images like those of the training are evenly spread over the shares, though they are few for so many
    directions; what lies as far away as usual, but in another direction, is strange; so is what another class is."""
    familiarity, (features, given) = Familiarity(2, 20), drawn(60, seed=0)
    distances = familiarity.fit(features, given)
    new, classes = drawn(4000, seed=1)
    shares = familiarity(new, classes)
    for limit in (0.1, 0.5, 0.9):
        assert (shares < limit).float().mean() == pytest.approx(limit, abs=0.12)
    x = familiarity.means[:1] + 3 * torch.eye(20)[[0, 9]]
    near, far = familiarity(x, torch.zeros(2, dtype=torch.long)).tolist()
    assert near > 0.2 and far == 0 and familiarity(new, 1 - classes).max() == 0
    means = np.stack([features[given == c].numpy().mean(0) for c in range(2)])
    covariance = np.cov((features.numpy() - means[given]).T, bias=True)
    precision = np.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * covariance.trace() / 20 * np.eye(20))
    expected = [(x - means[c]) @ precision @ (x - means[c]) for x, c in zip(new.numpy(), classes)]
    np.testing.assert_allclose(familiarity.distances(new, classes), expected, rtol=1e-3)
    assert familiarity.quantiles[[0, -1]].tolist() == [distances.min(), distances.max()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark red, green and blue images and a stray one, the run of a student on them, and the same with a second stray
    one in the folder more/."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(41):
        pixels = rng.integers(0, 60, (8, 8, 3), np.uint8)
        pixels[..., i % 3] += 90
        pixels = pixels if i < 40 else rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{i:02d}.png")
    tclip.write_csv(folder / "said.csv", [dict(file=f"{i:02d}.png", label="rgb"[i % 3]) for i in range(41)])
    shutil.copytree(folder / "photos", folder / "more")
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / "more/stray.png")
    how = "--size 8 --arch resnet8 --epochs 3 --batch-size 16 --views writing --device cpu".split()
    arguments = ["train", folder / "photos", "--pseudo-labels", folder / "said.csv", "--out", folder / "run", *how]
    main([str(argument) for argument in arguments])
    return folder


def test_commands(folder, tmp_path, capsys):
    """labels.csv holds each image's rank; stray images are the strangest; below the limit all is unknown, and nothing
    else; by a model.pt of tclip.py alone nothing is, which is told."""
    ranks = [float(row["familiar"]) for row in rows_of(folder / "run/labels.csv")]
    np.testing.assert_allclose(sorted(ranks), np.arange(41) / 41, atol=1e-6)
    assert ranks[40] == 0
    plain = torch.load(folder / "run/model.pt", weights_only=True)
    del plain["familiarity"]
    torch.save(plain, tmp_path / "plain.pt")

    def predicted(model, *arguments):
        main(["predict", str(folder / "more"), "--model", str(model), "--out", str(tmp_path / "out"), *arguments])
        rows = rows_of(tmp_path / "out/predictions.csv")
        shutil.rmtree(tmp_path / "out")
        return rows

    usual, rows = (predicted(folder / "run/model.pt", *more) for more in ((), ("--unknown", "0.3")))
    shares = {row["file"]: float(row["familiar"]) for row in rows}
    assert shares["stray.png"] == min(shares.values()) and 0.02 < np.mean([s < 0.3 for s in shares.values()]) < 0.6
    assert {row["label"] for row in usual} <= set("rgb")
    for row, before in zip(rows, usual):
        assert row["label"] == ("unknown" if shares[row["file"]] < 0.3 else before["label"])
    assert not capsys.readouterr().err
    rows = predicted(tmp_path / "plain.pt", "--unknown", "0.3")
    assert [row["label"] for row in rows] == [row["label"] for row in usual] and "familiar" not in rows[0]
    assert "no image is called unknown" in capsys.readouterr().err
    with pytest.raises(tclip.UserError, match="a class is called so already"):
        torch.save(plain | dict(classes=["a", "Unknown", "b"]), tmp_path / "plain.pt")
        predicted(tmp_path / "plain.pt", "--unknown", "0.3")
