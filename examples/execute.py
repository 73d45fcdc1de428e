"""Execute quickstart.ipynb from top to bottom and keep its outputs.

python examples/execute.py [--out FILE]
"""

import argparse
import time
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent / "quickstart.ipynb"


def execute(out: Path, folder: Path) -> float:
    """Execute the notebook in `folder`, write it to `out`. Returns the seconds that it took."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    began = time.perf_counter()
    resources = dict(metadata=dict(path=str(folder)))
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    nbformat.write(notebook, out)
    return time.perf_counter() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="(default: in place)")
    args = parser.parse_args()
    print(f"{execute(args.out, NOTEBOOK.parent.parent):.0f} s")
