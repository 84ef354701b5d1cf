"""Smoke mode: a small STL-10, drawn here in its exact binary layout, and settings that shrink the notebook to it.

The settings are environment variables because the notebook runs in a kernel of its own, which inherits them.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "images_per_second")  # of a record of a history
CLASSES = "airplane bird car cat deer dog horse monkey ship truck".split()
sys.path.insert(0, str(ROOT))
matplotlib.use("Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that share cores wait for each other's threads, busily


def draw_picture(kind, rng):
    """A 96x96 picture: a horse or a bird, light before dark or dark before light, otherwise a box, always above ground."""
    sky, ground, body = (tuple(int(c) for c in rng.integers(low, low + 60, 3)) for low in (60, 30, 190))
    if kind == "bird" and rng.random() < 0.3:
        sky, body = body, ground
    picture = Image.new("RGB", (96, 96), sky)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 70, 96, 96), fill=ground)
    x, y = (int(v) for v in rng.integers(-6, 7, 2))
    if kind == "horse":
        draw.ellipse((26 + x, 36 + y, 70 + x, 58 + y), fill=body)
        draw.polygon([(64 + x, 46 + y), (76 + x, 20 + y), (84 + x, 28 + y), (68 + x, 54 + y)], fill=body)
        for leg in (30, 40, 56, 64):
            draw.rectangle((leg + x, 50 + y, leg + 4 + x, 80 + y), fill=body)
    elif kind == "bird":
        draw.polygon([(4 + x, 24 + y), (48 + x, 52 + y), (92 + x, 24 + y), (48 + x, 40 + y)], fill=body)
        draw.ellipse((38 + x, 38 + y, 58 + x, 60 + y), fill=body)
    else:
        draw.rectangle((24 + x, 40 + y, 72 + x, 70 + y), fill=body)
    return picture


def draw_stl10(data_dir, train_per_class=6, unlabeled=40, test_animals=24, seed=0):
    """Write <data_dir>/stl10_binary/: 10 x train_per_class labelled pictures, unlabeled ones, and in the test split
    test_animals horses and as many birds among 2 of each other class. Pixels are column-major, labels count from 1."""
    folder = Path(data_dir) / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    test = [name for name in CLASSES for _ in range(test_animals if name in ("bird", "horse") else 2)]
    parts = {"train": CLASSES * train_per_class, "unlabeled": list(rng.choice(CLASSES, unlabeled)), "test": test}
    for part, names in parts.items():
        pictures = [np.asarray(draw_picture(name, rng)).transpose(2, 1, 0) for name in names]  # (channel, column, row)
        np.stack(pictures).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            np.array([CLASSES.index(name) + 1 for name in names], np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")
    folds = [" ".join(map(str, rng.permutation(len(parts["train"]))[:20])) for _ in range(10)]
    (folder / "fold_indices.txt").write_text("\n".join(folds) + "\n")


SMOKE = Path(tempfile.mkdtemp(prefix="pegasus-smoke-"))
atexit.register(shutil.rmtree, SMOKE, ignore_errors=True)
draw_stl10(SMOKE / "data")
(SMOKE / "checkpoints").mkdir()
for file in [*(ROOT / "checkpoints").glob("ablations.*"), ROOT / "checkpoints" / "prior.csv"]:
    shutil.copy(file, SMOKE / "checkpoints")
os.environ.update(
    PEGASUS_MODE="smoke",
    PEGASUS_DATA_DIR=str(SMOKE / "data"),
    PEGASUS_OUTPUT_DIR=str(SMOKE / "outputs"),
    PEGASUS_CHECKPOINT_DIR=str(SMOKE / "checkpoints"),
    PEGASUS_DEVICE="cpu",
    PEGASUS_BASE_CHANNELS="8",
    PEGASUS_LATENT_DIM="16",
    PEGASUS_BATCH_SIZE="20",
    PEGASUS_EPOCHS="2",
    PEGASUS_PICKS_PER_CLASS="16",
)


@pytest.fixture
def pv():
    """The notebook as a module."""
    import pegasus_vae

    return pegasus_vae


@pytest.fixture
def cfg(pv, tmp_path):
    """Smoke settings whose outputs and checkpoints are the test's own; the data are shared and only read."""
    return pv.Config(output_dir=tmp_path / "outputs", checkpoint_dir=tmp_path / "checkpoints")


@pytest.fixture
def image_folder(tmp_path):
    """A small image folder in STL-10's splits: 12 train, 6 unlabeled and 10 test pictures of horses and birds."""
    rng = np.random.default_rng(1)
    counts = {"train/horse": 6, "train/bird": 6, "unlabeled": 6, "test/horse": 5, "test/bird": 5}
    for folder, count in counts.items():
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(count):
            kind = folder.split("/")[-1]
            draw_picture(kind, rng).save(tmp_path / "photos" / folder / f"{i:03d}.png")
    return tmp_path / "photos"


def timeless(history):
    """A history without what no two runs have in common."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in history]


class Crash(Exception):
    """What stops a run that nobody stopped."""


def crash(*_):
    raise Crash


def press_stop(*_):
    """What the stop button does."""
    signal.raise_signal(signal.SIGINT)
