"""The page to hand in: one HTML file of the committed notebook that needs no other file, no host and no kernel."""

import nbformat
import pytest
from bs4 import BeautifulSoup

from browser import CHROMIUM, chromium
from conftest import ROOT
from tools.export_page import make_page, to_label

PRINTABLE = round((210 - 2 * 15) / 25.4 * 96)  # CSS pixels between the margins of A4
WIDGET = "application/vnd.jupyter.widget"
CUT = """() => [...document.querySelectorAll("main *")].filter(e =>
    e.clientWidth && e.scrollWidth > e.clientWidth || e.getBoundingClientRect().right > innerWidth
).map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def notebook():
    """The committed notebook, two more cells hidden, one line of code far too long, a saved widget."""
    notebook = nbformat.read(ROOT / "pegasus_vae.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [cell for cell in code if not cell.metadata.get("jupyter")]
    drawn = next(cell for cell in shown if cell.outputs and "data" in cell.outputs[0])
    drawn.outputs[0].data[f"{WIDGET}-view+json"] = {"model_id": "0"}
    notebook.metadata["widgets"] = {f"{WIDGET}-state+json": {"state": {"0": {}}}}
    drawn.metadata["jupyter"] = {"source_hidden": True}
    silent = next(cell for cell in shown if not cell.outputs)
    silent.metadata["tags"] = ["hide-input"]
    silent.source += "\n# " + 300 * "x"
    return notebook


@pytest.fixture(scope="module")
def html(notebook):
    return make_page(notebook)


@pytest.fixture(scope="module")
def page(html):
    return BeautifulSoup(html, "html.parser")


def test_hidden_source_is_folded_and_nothing_else(notebook, page):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    folded = [cell for cell in code if cell.metadata.get("jupyter") or "hide-input" in cell.metadata.get("tags", [])]
    assert [fold.pre.get_text().strip() for fold in page.select("details")] == [cell.source.strip() for cell in folded]
    assert [fold.summary.get_text() for fold in page.select("details")] == [to_label(cell.source) for cell in folded]
    assert len(page.select(".highlight")) == len(code) and page.select("details .output") == []


@pytest.mark.parametrize(
    "source, label",
    [
        ("# The data: where they lie\nimport os", "The data: where they lie"),
        ('def f(x):\n    """Twice x.\n\n    Never less."""\n    return 2 * x', "Twice x."),
        ('text = """<style>"""  # no docstring', "code"),
    ],
)
def test_a_fold_says_what_is_in_it(source, label):
    assert to_label(source) == label


def test_pictures_have_their_alternative_texts(notebook, page):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    texts = [about["alt"] for output in outputs for about in output.get("metadata", {}).values()]
    assert [picture["alt"] for picture in page.select(".output img")] == texts and len(texts) >= 20


def test_formulas_are_mathml(page):
    assert len(page.select("math[display=block]")) >= 5
    texts = [text for text in page.find_all(string=True) if not text.find_parent(["pre", "code", "style"])]
    assert [text for text in texts if "$" in text or "\\" in text] == []


def test_it_needs_nothing_else(html, page):
    assert page.select("script, link, iframe, object, base") == []
    assert [tag["src"][:40] for tag in page.select("[src]") if not tag["src"].startswith("data:image/")] == []
    assert not any(word in style.get_text() for style in page.select("style") for word in ("url(", "@import"))
    assert len(html.encode()) < 10e6


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, and the printed page is measured")
def test_on_paper_nothing_is_cut_off(html, tmp_path):
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    with chromium() as browser:
        paper = browser.new_context(offline=True, viewport={"width": PRINTABLE, "height": 1000}).new_page()
        asked = []
        paper.on("request", lambda request: asked.append(request.url[:40]))
        paper.emulate_media(media="print")
        paper.goto((tmp_path / "page.html").as_uri())
        paper.locator("details").evaluate_all("folds => folds.forEach(fold => fold.open = true)")
        assert paper.evaluate(CUT) == []
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_links_of_the_contents_lead_to_headings(page):
    targets = [link["href"][1:] for link in page.select("main a[href^='#']")]
    assert len(targets) > 20 and [target for target in targets if not page.find(id=target)] == []
