"""The first five minutes of a reader: the script in demo mode, without data and without a network."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT

NO_NETWORK = """
import runpy, socket, sys

def refuse(*_):
    raise AssertionError("demo mode opened a socket")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
sys.argv = ["pegasus_vae.py", *sys.argv[1:]]
runpy.run_path("pegasus_vae.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder of the outputs, and what the script printed."""
    outputs = tmp_path_factory.mktemp("demo") / "outputs"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEGASUS_")}
    arguments = ["--output-dir", str(outputs), "--data-dir", str(outputs / "no-data")]
    command = [sys.executable, "-W", "error::UserWarning", "-c", NO_NETWORK, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return outputs, done.stdout


def read(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_it_ends_with_64_different_pegasi(demo):
    pegasi = [read(demo[0] / "pegasus" / f"{number:02d}.png") for number in range(64)]
    assert {picture.shape for picture in pegasi} == {(64, 64, 3)}
    assert len({picture.tobytes() for picture in pegasi}) == 64
    assert min(picture.std() for picture in pegasi) > 5, "a blank picture is no pegasus"


@pytest.mark.parametrize(
    "name",
    ["architecture", "curves", "reconstructions", "horses", "birds", "flip", "pegasus", "best"]
    + ["reach", "spatial_reconstructions", "pegasus_spatial", "pegasus_composed", "composed_best"],
)
def test_the_figures_are_there_and_not_blank(demo, name):
    assert read(demo[0] / f"{name}.png").std() > 5


@pytest.mark.parametrize("name", ["pegasus", "pegasus_composed"])
def test_picks_and_compositions_make_the_batches_that_ship(demo, name):
    """Those were drawn with the photographs at hand; of another composition the difference is 20 and more."""
    made, shipped = (read(folder / f"{name}.png").astype(float) for folder in (demo[0], ROOT / "checkpoints"))
    assert made.shape == shipped.shape and abs(made - shipped).mean() < 2  # of 255


def test_it_says_what_it_used_and_where_the_pictures_went(demo):
    outputs, printed = demo
    assert "mode demo" in printed and "shipped picks: 64 horses, 64 birds" in printed
    assert "64 compositions, shipped" in printed, "all of them fit the shipped candidates"
    assert str(outputs / "pegasus.png") in printed and str(outputs / "best.png") in printed


def test_it_leaves_nothing_but_figures(demo):
    assert {path.suffix or path.name for path in demo[0].rglob("*")} == {".png", "pegasus"}
