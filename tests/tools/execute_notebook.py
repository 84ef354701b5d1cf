"""Bring pegasus_vae.ipynb in step with pegasus_vae.py and execute it in demo mode, as it is committed.

python tests/tools/execute_notebook.py DIR      DIR holds the photographs, so that figures show originals

Progress bars and widget views are left out: without a kernel, a viewer shows an error in their place.
"""

import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"
PROGRESS = re.compile(r"\d+%\|")


def main():
    own_picks = ROOT / "outputs" / "picks.json"
    if own_picks.exists():
        raise SystemExit(f"{own_picks} would replace the shipped picks: move it away first")
    for name in [name for name in os.environ if name.startswith("PEGASUS_")]:
        del os.environ[name]
    os.environ["PEGASUS_DATA_DIR"] = sys.argv[1]
    started = time.perf_counter()
    notebook = jupytext.read(ROOT / "pegasus_vae.py")
    client = NotebookClient(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        store_widget_state=False,
        coalesce_streams=True,
        record_timing=False,
    )
    client.execute()
    for cell in notebook.cells:
        cell.pop("id", None)  # random, and of no use: cells are told apart by their place
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not PROGRESS.search(str(output))]
            for output in cell.outputs:
                output.get("data", {}).pop(WIDGET, None)
    notebook.nbformat_minor = 4
    nbformat.write(notebook, ROOT / "pegasus_vae.ipynb")
    print(f"executed in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
