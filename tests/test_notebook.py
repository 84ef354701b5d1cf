"""The committed pair: in sync, executed in demo mode, readable without a kernel, and of a size that one reads."""

import base64
import io
import itertools
import re
from statistics import median

import jupytext
import nbformat
import numpy as np
import pytest
from jupytext.compare import compare_notebooks
from PIL import Image

from conftest import ROOT

PATH = ROOT / "pegasus_vae.ipynb"
SCRIPT = ROOT / "pegasus_vae.py"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def cells():
    """The cells of the script."""
    return jupytext.read(SCRIPT).cells


@pytest.fixture(scope="module")
def pictures(code_cells):
    """The content and the alternative text of each figure."""
    found = [(output, kind) for cell in code_cells for output in cell.outputs for kind in output.get("data", {})]
    found = [(output.data[kind], output.metadata[kind]["alt"]) for output, kind in found if kind.startswith("image/")]
    assert len(found) >= 20, "the story has at least twenty figures"
    return found


def is_folded(cell):
    return cell.metadata.get("jupyter", {}).get("source_hidden", False)


def test_notebook_and_script_are_the_same_text(notebook):
    compare_notebooks(notebook, jupytext.read(SCRIPT), fmt="py:percent")


def test_every_cell_was_executed_once_and_in_order(code_cells):
    assert [cell.execution_count for cell in code_cells] == list(range(1, len(code_cells) + 1))


@pytest.mark.parametrize("file", [PATH, SCRIPT], ids=["notebook", "script"])
def test_the_only_tag_is_that_of_folded_code_cells_and_they_all_have_it(file):
    for cell in jupytext.read(file).cells:
        assert cell.metadata.get("tags", []) == ["hide-input"] * is_folded(cell), cell.source
        assert cell.metadata.get("jupyter", {}) == ({"source_hidden": True} if is_folded(cell) else {}), cell.source
        assert cell.cell_type == "code" or not is_folded(cell), cell.source


def test_no_error_no_warning_and_no_progress_bar_is_left(code_cells):
    outputs = [output for cell in code_cells for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    assert not re.search(r"\d+%\|", str(outputs))


def test_figures_have_alt_text_and_are_not_blank(pictures):
    for content, alt in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("L"))
        assert len(alt) > 20, alt
        assert pixels.std() > 5 and min(pixels.shape) > 100, alt


@pytest.mark.parametrize(
    "text",
    ["mode demo", "shipped picks: 64 horses, 64 birds", "800 birds, photographs"]
    + ["64 of 64 are shipped compositions"],
)
def test_it_was_executed_in_demo_mode_with_the_photographs(code_cells, text):
    assert text in "".join(output.get("text", "") for cell in code_cells for output in cell.outputs)


def test_no_path_of_a_machine_no_widget_state_and_under_10_mb(notebook, code_cells):
    outputs = str([cell.outputs for cell in code_cells])
    assert not re.search(r"/(root|home|tmp|work|Users)/", outputs)
    assert "widgets" not in notebook.metadata
    assert PATH.stat().st_size < 10e6


def test_nothing_unfinished_is_left_in_the_text(cells):
    text = "\n".join(cell.source for cell in cells)
    assert re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", text) == []
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.findall(r"\b(?!PEGASUS_)[A-Z]{2,}_[A-Z_]+\b|^[A-Z]{3,}$", text, re.MULTILINE) == [], "names of gaps"


def test_the_text_is_not_too_long():
    assert len(SCRIPT.read_text().splitlines()) <= 3200


def test_cells_are_short_and_those_to_be_read_shorter(cells):
    lengths = {False: [], True: []}
    for cell in cells:
        if cell.cell_type == "code":
            lengths[is_folded(cell)].append(len(cell.source.splitlines()))
    assert max(lengths[False]) <= 50 and max(lengths[True]) <= 80
    assert median(lengths[False]) <= 16


def test_the_first_equation_becomes_code_early():
    lines = SCRIPT.read_text().splitlines()
    assert next(i for i, line in enumerate(lines, 1) if line.startswith("def reparameterize")) < 350


def test_a_sentence_stands_before_what_is_folded(cells):
    """Where several folded cells follow one another, before the first of them."""
    for before, cell in itertools.pairwise(cells):
        assert not is_folded(cell) or is_folded(before) or before.cell_type == "markdown", cell.source
