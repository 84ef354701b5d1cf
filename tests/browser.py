"""A real JupyterLab, which also serves Notebook 7, and a real Chromium, for the tests of the pickers.

python tests/browser.py     prints how fast the pickers are: first page, page flip, click to file, click to pegasus
                            (with the tests' small networks, so that the widgets count and not the models)
BROWSER_SLOWDOWN=4          makes every page as slow as on a processor of a quarter of the speed
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SLOWDOWN = float(os.environ.get("BROWSER_SLOWDOWN", 1))
SERVER = ["--no-browser", "--allow-root", "--ServerApp.port_retries=0", "--IdentityProvider.token=pegasus"]
SERVER += ["--ServerApp.tornado_settings={'ws_ping_interval': 0}"]  # else a page that is too slow to answer is cut off
opened = []  # notebooks: what their pages show is said where a condition does not come true


def until(condition, what, seconds=60):
    """Poll condition() until it is true without an exception, and return what it returned.

    An exception is no answer: the file is not there yet, say, or a picture is replaced while it is read. After that many
    seconds AssertionError, with the last exception and what the pages show.
    """
    started = time.monotonic()
    while True:
        try:
            if value := condition():
                return value
            trouble = None
        except Exception as error:
            trouble = error
        waited = time.monotonic() - started
        if waited > seconds:
            last = f"; last: {type(trouble).__name__}: {trouble}" if trouble else ""
            pages = "".join(f"\n{notebook.look()}" for notebook in opened)
            raise AssertionError(f"not within {seconds} s: {what}{last}{pages}") from trouble
        time.sleep(min(0.25, max(0.01, waited / 10)))  # no busier than needed: the kernel may share the processor


class Jupyter:
    """A Jupyter server that shows a copy of the notebook, without outputs, in a folder of its own."""

    def __init__(self, folder, **settings):
        """settings: environment variables for the kernel."""
        self.folder = folder
        jupytext.write(jupytext.read(ROOT / "pegasus_vae.py"), folder / "pegasus_vae.ipynb")
        shutil.copytree(ROOT / "checkpoints", folder / "checkpoints", ignore=shutil.ignore_patterns("*.safetensors"))
        news = folder / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        news.mkdir(parents=True)
        (news / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
        command = [sys.executable, "-m", "jupyterlab", *SERVER, "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
        self.log = open(folder / "server.log", "w")
        environment = os.environ | own | settings | {"PYTHONPATH": ""}
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=self.log, stderr=self.log)
        until(self.answers, f"the server starts, see {folder / 'server.log'}", 300)
        assert self.process.poll() is None, f"the server ended, see {folder / 'server.log'}"

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:  # it waits for the browser; kernels end with it
            self.process.kill()
            self.process.wait()
        self.log.close()

    def answers(self):
        """Whether the server answers; one that has ended never will."""
        return self.process.poll() is not None or self.sessions() is not None

    def sessions(self):
        with urllib.request.urlopen(f"{self.url}/api/sessions?token=pegasus", timeout=10) as answer:
            return {session["path"]: session["kernel"] for session in json.load(answer)}

    def idle(self, name):
        """Whether the kernel of a notebook is there, has a page, and has nothing to do."""
        kernel = self.sessions().get(name)
        return kernel and kernel["connections"] and kernel["execution_state"] == "idle"


@contextmanager
def chromium():
    """A headless Chromium with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Notebook:
    """The notebook in a page of the browser. interface: "lab" or "notebooks" (Notebook 7)."""

    def __init__(self, jupyter, browser, interface, outputs):
        self.jupyter, self.outputs = jupyter, outputs
        self.name = f"{interface}.ipynb"  # a name of its own, and so a kernel of its own
        shutil.copy(jupyter.folder / "pegasus_vae.ipynb", jupyter.folder / self.name)
        self.page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.page.set_default_timeout(60_000)
        self.devtools = self.page.context.new_cdp_session(self.page)
        self.devtools.send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
        path = f"lab/tree/{self.name}" if interface == "lab" else f"notebooks/{self.name}"
        opened.append(self)
        self.page.goto(f"{jupyter.url}/{path}?token=pegasus", timeout=300_000)
        self.ready()

    def look(self):
        """What can be seen in the page, in words, and where its picture is."""
        try:
            picture = self.jupyter.folder / f"{self.name}.png"
            self.page.screenshot(path=picture)
            cells, status = self.page.locator(".jp-Cell").count(), self.page.locator(".jp-Notebook-ExecutionIndicator")
            said = self.page.locator(".jp-Dialog, .pegasus-picker [role=status], .jp-OutputArea-output")
            said = said.filter(has_text=re.compile(r"^Error|^Loading widget|picked|horse \d|Cancel")).all_inner_texts()
            return f"{picture}: {cells} cells, kernel {status.get_attribute('data-status')}, {said}"
        except Exception as error:
            return f"{self.name}: {type(error).__name__}: {error}"

    def ready(self):
        """Wait for the kernel; where Jupyter asks which one, take the one it offers."""
        idle = self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")

        def connected():
            if self.page.locator(".jp-Dialog").count():
                self.page.keyboard.press("Enter")
            return idle.count() and self.jupyter.idle(self.name)

        until(connected, "the notebook opens and the kernel is connected", 300)

    def menu(self, menu, *items):
        """Choose an item of a menu, or of a menu in it."""
        self.page.get_by_role("menuitem", name=menu, exact=True).click()
        for item in items:
            self.page.locator(".lm-Menu-item").filter(has_text=item).first.click()

    def run(self, item, last):
        """Choose an item of the menu Run and wait until the page shows that all has run; last: a file written by then."""
        last = self.outputs / last
        last.unlink(missing_ok=True)
        waiting = "[...document.querySelectorAll('.jp-InputPrompt')].filter(e => e.textContent.includes('*')).length"
        self.menu("Run", item)

        def errors():
            return self.page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()

        def done():
            return last.exists() and self.jupyter.idle(self.name) and not self.page.evaluate(waiting)

        until(lambda: done() or errors(), f"the cells have run: {item}", 600)
        assert not errors(), errors()

    def run_all(self):
        """Run all cells."""
        self.run("Run All Cells", "title.png")

    def run_below(self):
        """Run the cells from the contact sheets on."""
        self.select(self.page.locator(".jp-CodeCell").filter(has_text="def contact_sheet("))
        self.run("Run Selected Cell and All Below", "title.png")

    def run_to(self, picker):
        """Run the cells up to that of a picker, and this one."""
        cell = picker.locator("xpath=ancestor::*[contains(@class, 'jp-CodeCell')]")
        self.select(cell)
        self.run("Run All Above Selected Cell", "birds.png")
        cell.locator(".cm-content").press("Control+Enter")

    def select(self, cell):
        """Put the cursor into a cell."""
        code = cell.locator(".cm-content")
        code.click(position={"x": 5, "y": 5})
        until(lambda: code.evaluate("e => e.contains(document.activeElement)"), "the cursor is in the cell")

    def choose_theme(self, theme):
        """theme: "Light" or "Dark"."""
        self.menu("Settings", "Theme", f"JupyterLab {theme}")
        light = {"Light": "true", "Dark": "false"}[theme]
        self.page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")

    def picker(self, group):
        """The picker of "horse", "bird", "dark" or "best", or the "composer", scrolled into view.

        Jupyter adds a cell to the page whenever the page is idle, the pickers' after dozens of others. Scrolling there
        meanwhile only keeps the page busy.
        """
        words = {"dark": "marked as dark-winged", "best": "best pegasi picked", "composer": r"horse \d+ of \d+"}
        status = re.compile(words.get(group, rf"\d+ {group}s picked"))
        picker = self.page.locator(".pegasus-picker", has=self.page.locator("[role=status]", has_text=status)).last

        def drawn():
            if picker.count():
                picker.scroll_into_view_if_needed()
                return picker.get_by_role("status").inner_text()

        until(drawn, f"the picker of {group} is drawn", 300)
        return picker


def measure(notebook, picks):
    """Print the seconds of ten first pages, page flips, and clicks until file and picture have followed."""
    picker = notebook.picker("bird")
    seconds = {"first page of 40": [], "page flip, 40 new pictures": [], "click to file": []}
    seconds |= {"click to pegasus": [], "the same, mended by 0.3": []}
    undrawn = "imgs => imgs.length != 40 || imgs.some(i => i.dataset.seen || !i.complete || !i.naturalWidth)"
    mark = "imgs => imgs.forEach(i => { i.dataset.seen = 1 })"

    def timed(what, action, condition):
        """Note the seconds from the action until the condition holds."""
        started = time.perf_counter()
        action()
        until(condition, what)
        seconds[what].append(time.perf_counter() - started)

    def drawn():
        """Whether forty pictures are drawn that were not there before."""
        return not picker.locator("img").evaluate_all(undrawn)

    code = picker.locator("xpath=ancestor::*[contains(@class, 'jp-CodeCell')]").locator(".cm-content")
    for _ in range(10):
        picker.locator("img").evaluate_all(mark)
        timed("first page of 40", lambda: code.press("Control+Enter"), drawn)
    for _ in range(10):
        picker.locator("img").evaluate_all(mark)
        timed("page flip, 40 new pictures", picker.get_by_role("button", name="Next").click, drawn)
    for turn in range(10):
        before = picks.read_bytes() if picks.exists() else b""
        follows = lambda: picks.exists() and picks.read_bytes() != before  # noqa: B023, E731
        timed("click to file", picker.get_by_role("checkbox").nth(turn).click, follows)
    composer = notebook.picker("composer")
    pegasus, mend = composer.get_by_role("img").last, composer.locator(".widget-hslider").last
    for what, strength in (("click to pegasus", "0"), ("the same, mended by 0.3", "0.3")):
        mend.locator(".widget-readout").fill(strength)
        mend.locator(".widget-readout").press("Enter")
        until(lambda: strength in mend.inner_text() and notebook.jupyter.idle(notebook.name), "the slider is set")  # noqa: B023
        for _ in range(10):
            before = pegasus.get_attribute("src")
            follows = lambda: pegasus.get_attribute("src") != before  # noqa: B023, E731
            timed(what, composer.get_by_role("checkbox", name="dark winged").click, follows)
    for what, values in seconds.items():
        numbers = [min(values), statistics.median(values), max(values)]
        print(f"{what:28}" + "".join(f"{number:8.2f}" for number in numbers))


def main():
    from conftest import draw_stl10

    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        folder = Path(scratch)
        draw_stl10(folder / "data", test_animals=1339)
        (folder / "server").mkdir()
        settings = {"PEGASUS_DATA_DIR": folder / "data", "PEGASUS_OUTPUT_DIR": folder / "outputs"}
        jupyter = Jupyter(folder / "server", **{name: str(value) for name, value in settings.items()})
        try:
            print(f"{os.cpu_count()} cores, Chromium {browser.version}, 1,339 birds; seconds")
            print(f"{'':28}     min  median     max")
            for interface in ("lab", "notebooks"):
                (folder / "outputs" / "picks.json").unlink(missing_ok=True)
                notebook = Notebook(jupyter, browser, interface, folder / "outputs")
                print({"lab": "JupyterLab", "notebooks": "Notebook 7"}[interface])
                notebook.run_all()
                measure(notebook, folder / "outputs" / "picks.json")
        finally:
            jupyter.close()


if __name__ == "__main__":
    main()
