"""Write the notebook, with the outputs that it was saved with, as one HTML page to hand in.

python tests/tools/export_page.py       writes outputs/pegasus_vae.html

The page needs no other file, no host and no kernel: pictures are in it, formulas are MathML, which browsers draw
themselves. Source that is hidden in Jupyter is folded and opens by a click; on paper it is as it was on the screen.
"""

import re
from pathlib import Path

import nbformat
from math_core import LatexToMathML
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

ROOT = Path(__file__).parents[2]
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]  # no widget, no script


class PageRenderer(IPythonRenderer):
    """Markdown to HTML, formulas to MathML; math_core.LatexError for a formula that math_core does not know."""

    convert = LatexToMathML(fancy_error=False).convert_with_local_state

    def inline_math(self, body):
        return self.convert(body, displaystyle=False)

    def block_math(self, body):
        if r"\tag" in body:  # allowed in a numbered environment only
            return self.latex_environment("equation", body)
        return self.convert(body, displaystyle=True)

    def latex_environment(self, name, body):
        return self.convert(rf"\begin{{{name}}}{body}\end{{{name}}}", displaystyle=True)


def to_html(markdown):
    """HTML of a Markdown cell; pictures that it names, relative to the project, become part of it."""
    renderer = PageRenderer(escape=False, embed_images=True, path=str(ROOT), anchor_link_text="")
    return MarkdownWithMath(renderer).render(markdown)


def to_label(source):
    """What stands in place of a folded cell: its first line if that is a comment, or the first line of its first
    docstring, or "code"."""
    found = re.match(r"#\s*(.+)", source) or re.search(r':\n +"""(.+?)("""|\n)', source)
    return found[1] if found else "code"


def make_page(notebook):
    """The HTML page of a notebook with outputs, whose first line is the title."""
    exporter = HTMLExporter(
        config=Config(NbConvertBase={"display_data_priority": SHOWN}),
        template_name="classic",
        template_file="page.html.j2",
        extra_template_paths=[str(Path(__file__).parent / "page_template")],
        filters={"markdown2html": to_html, "label": to_label},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    return exporter.from_notebook_node(notebook)[0]


def main():
    page = ROOT / "outputs" / "pegasus_vae.html"
    page.parent.mkdir(exist_ok=True)
    page.write_text(make_page(nbformat.read(ROOT / "pegasus_vae.ipynb", as_version=4)), encoding="utf-8")
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
