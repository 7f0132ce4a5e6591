"""Write real_answers.npz: what a tutorial needs of two public files, small enough to lie in this repository.

    python tutorials/real_answers.py --root data

OpenAI's CLIP ViT-B/32 on WHU-RS19 (1,005 aerial images, 19 classes), from its features that the authors of RS-TransCLIP
have published; and how GPT-4V names 7,991 images of EuroSAT, from the answers that the authors of GPT4Vis have. Both
under the MIT licence, in real_answers_LICENSE.txt. The images themselves are in neither file.

features (1005, 512) and mean_text (19, 512), the mean of all 107 prompts, unit rows; prompts, every 13th of them, and
their texts (9, 19, 512); all float16. truth (1005,), classes (19,). eurosat_classes (10,) and gpt4v (10, 10): how many
images of each true class, a row, have got each name; what it refused to name is left out.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "benchmark")]  # tclip.py of this checkout, and the suites
from suites import GPT4V, arrays_of, need
from whurs19 import WHURS19


def unit(rows):
    """Rows of length one, float32."""
    return rows.astype(np.float32) / np.linalg.norm(rows.astype(np.float32), axis=-1, keepdims=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the two public files [data]")
    root = parser.parse_args().root
    saved = arrays_of(need(root, "whurs19_openai_clip_features.npz", WHURS19))
    texts = unit(saved["texts_ViT-B-32"])  # (107, 19, 512)
    kept = dict(features=unit(saved["images_ViT-B-32"]), mean_text=unit(texts.mean(0)), texts=texts[::13])
    arrays = {name: rows.astype(np.float16) for name, rows in kept.items()}
    arrays |= dict(prompts=saved["prompts"][::13], truth=saved["labels"], classes=saved["classes"])
    with open(need(root, "eurosat_gpt4v.csv", GPT4V), newline="", encoding="utf-8") as file:
        answers = [(row["file"].split("/")[0], row["rank1"]) for row in csv.DictReader(file)]
    folders = sorted({folder for folder, _ in answers})
    counts = [[answers.count((folder, name)) for name in folders] for folder in folders]
    path = HERE / "real_answers.npz"
    np.savez_compressed(path, **arrays, eurosat_classes=np.array(folders), gpt4v=np.array(counts))
    print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
