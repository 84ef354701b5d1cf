"""The committed pair: in sync, executed in demo mode, readable without a kernel."""

import base64
import io
import re

import jupytext
import nbformat
import numpy as np
import pytest
from jupytext.compare import compare_notebooks
from PIL import Image

from conftest import ROOT

PATH = ROOT / "pegasus_vae.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def pictures(code_cells):
    """The content and the alternative text of each figure."""
    found = [(output, kind) for cell in code_cells for output in cell.outputs for kind in output.get("data", {})]
    found = [(output.data[kind], output.metadata[kind]["alt"]) for output, kind in found if kind.startswith("image/")]
    assert len(found) >= 25, "the story has at least twenty-five figures"
    return found


def test_notebook_and_script_are_the_same_text(notebook):
    compare_notebooks(notebook, jupytext.read(ROOT / "pegasus_vae.py"), fmt="py:percent")


def test_every_cell_was_executed_once_and_in_order(code_cells):
    assert [cell.execution_count for cell in code_cells] == list(range(1, len(code_cells) + 1))


def test_no_cell_is_tagged_to_be_skipped_or_to_fail(notebook):
    assert [cell.metadata.tags for cell in notebook.cells if cell.metadata.get("tags")] == []


def test_no_error_no_warning_and_no_progress_bar_is_left(code_cells):
    outputs = [output for cell in code_cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert not re.search(r"\d+%\|", str(outputs))


def test_figures_have_alt_text_and_are_not_blank(pictures):
    for content, alt in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"))
        assert len(alt) > 20, alt
        assert pixels.std() > 5 and min(pixels.shape) > 100, alt


def test_it_was_executed_in_demo_mode_with_the_photographs(code_cells):
    text = "".join(output.get("text", "") for cell in code_cells for output in cell.outputs)
    assert "mode demo" in text and "shipped picks: 64 horses, 64 birds" in text and "1339 birds, photographs" in text
    assert "64 compositions, shipped" in text


def test_no_path_of_a_machine_no_widget_state_and_under_10_mb(notebook, code_cells):
    outputs = str([cell.outputs for cell in code_cells])
    assert not re.search(r"/(root|home|tmp|work|Users)/", outputs)
    assert "widgets" not in notebook.metadata
    assert PATH.stat().st_size < 10e6


def test_nothing_unfinished_is_left_in_the_text(notebook):
    source = "\n".join(cell.source for cell in notebook.cells)
    assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", source)
