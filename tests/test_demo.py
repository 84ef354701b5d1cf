"""The first five minutes of a reader: the script in demo mode, without data and without a network."""

import json
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


BATCHES = ["pegasus", "pegasus_composed", "pegasus_mended", "pegasus_machine"]


@pytest.mark.parametrize("name", BATCHES)
def test_it_ends_with_64_different_pegasi_of_each_kind(demo, name):
    assert sorted(path.name for path in (demo[0] / name).iterdir()) == [f"{number:02d}.png" for number in range(64)]
    pegasi = [read(demo[0] / name / f"{number:02d}.png") for number in range(64)]
    assert {picture.shape for picture in pegasi} == {(64, 64, 3)}
    assert len({picture.tobytes() for picture in pegasi}) == 64
    assert min(picture.std() for picture in pegasi) > 5, "a blank picture is no pegasus"


@pytest.mark.parametrize(
    "name",
    "architecture curves reconstructions prior horses birds flip interpolation pegasus pegasus_rescaled best best_family "
    "sweep reach spatial_reconstructions spatial_prior pegasus_spatial pegasus_composed best_composed "
    "composed_best title flow_draws flow_classes mending pegasus_mended "
    "pegasus_machine".split(),
)
def test_the_figures_are_there_and_not_blank(demo, name):
    assert read(demo[0] / f"{name}.png").std() > 5


@pytest.mark.parametrize("kind", ["", "_composed"])
def test_the_best_is_the_chosen_one_of_the_batch_enlarged(demo, kind):
    best = Image.open(demo[0] / f"best{kind}.png")
    assert best.size == (256, 256)
    small = np.asarray(best.resize((64, 64), Image.Resampling.BOX), float)
    batch = [read(path) for path in sorted((demo[0] / f"pegasus{kind}").iterdir())]
    distances = [abs(small - picture).mean() for picture in batch]
    best, second = np.argsort(distances)[:2]
    assert distances[best] < 4 < distances[second]  # of 255
    assert f"number {best} is best.png" in demo[1] or kind
    choices = json.loads((ROOT / "checkpoints" / "picks.json").read_text())
    good = [choices["compositions"][str(horse)]["good"] for horse in choices["horse"]]
    assert best == (good.index(True) if kind else list(choices["best"].values())[0][-1])


def test_picks_and_compositions_make_the_title_that_ships(demo):
    """It shows both batches. It was drawn with the photographs at hand, here the birds are those of the decoder."""
    made, shipped = (read(folder / "title.png").astype(float) for folder in (demo[0], ROOT / "checkpoints"))
    assert made.shape == shipped.shape and abs(made - shipped).mean() < 4  # of 255


def test_it_says_what_it_used_and_where_the_pictures_went(demo):
    outputs, printed = demo
    assert "mode demo" in printed and "shipped picks: 64 horses, 64 birds" in printed
    assert "64 of 64 are shipped compositions" in printed, "all of them fit the shipped candidates"
    assert printed.count("no photographs here to compare with") == 3
    assert str(outputs / "pegasus.png") in printed and str(outputs / "pegasus_composed.png") in printed


def test_it_leaves_nothing_but_figures(demo):
    assert {path.suffix or path.name for path in demo[0].rglob("*")} == {".png", *BATCHES}
