"""Run the tutorials, and write what comes out into their notebooks.

    python tutorials/build.py          # all five, in some minutes
    python tutorials/build.py 02 04    # these
    python tutorials/build.py --keep   # outputs stay: only prose has changed, or the place of code within tclip.py

0X_name.py becomes 0X_name.ipynb, with all outputs. The picture of the cell tagged "picture" goes to pictures/0X.png.
"""

import argparse
import base64
import os
import sys
from operator import attrgetter
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from plots import source_of

import tclip


def execute(notebook):
    """Run all cells in a new process, from the folder of the tutorials."""
    NotebookClient(notebook, timeout=None, resources=dict(metadata=dict(path=str(HERE)))).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it was run is nobody's concern


def keep(notebook, old):
    """Take the outputs of the `old` notebook, which has the same code; links into tclip.py are made anew."""
    cells, old_cells = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, old))
    if [cell.source for cell in cells] != [cell.source for cell in old_cells]:
        raise SystemExit("code has changed: build it without --keep")
    notebook.metadata = old.metadata  # what the kernel said of itself
    for cell, old_cell in zip(cells, old_cells):
        cell.outputs, cell.execution_count = old_cell.outputs, old_cell.execution_count
        for shown, code in zip(cell.outputs, cell.outputs[1:]):
            name, _, place = shown.get("data", {}).get("text/plain", "").partition(": tclip.py, ")
            if place:
                shown.data["text/markdown"], shown.data["text/plain"], now = source_of(attrgetter(name)(tclip))
                if now.strip() != code.text.strip():
                    raise SystemExit(f"tclip.{name} has changed: build it without --keep")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="01 to 05; none: all")
    parser.add_argument("--keep", action="store_true", help="keep the outputs")
    given = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # bars are for terminals
    for script in sorted(HERE.glob("0*.py")):
        if given.numbers and script.name[:2] not in given.numbers:
            continue
        notebook, path = jupytext.read(script), script.with_suffix(".ipynb")
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"  # jupytext's are random, and would differ each time
        keep(notebook, nbformat.read(path, 4)) if given.keep else execute(notebook)
        for cell in notebook.cells:
            if "picture" in cell.metadata.get("tags", []):
                picture = next(o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
                (HERE / "pictures" / f"{script.name[:2]}.png").write_bytes(base64.b64decode(picture))
        jupytext.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")
