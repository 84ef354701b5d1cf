"""Measure what the notebook claims about speed; nothing here is asserted, everything is printed.

python tests/benchmark.py [--base-channels 32] [--steps 20] [--repeats 3] [--images 105000]

1. Training, images/s: the notebook's fit against the usual pipeline (torchvision's STL10 with PIL Resize and ToTensor,
   DataLoader with two workers, float32, default memory layout, eager, loss.item() at each step), same model, same batch
   size, alternating in one run.
2. The data: time and peak memory of making the 64x64 cache of an STL-10 of --images pictures, and of the second start.
3. The demo, from the shell to the last figure.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import STL10

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pegasus_vae as pv  # noqa: E402

BATCH_SIZE = 64
PAPER_IMAGES = 105_000 * 100


class GeneratedSTL10(STL10):
    """torchvision's STL10, without the checksums that only the published files have."""

    def _check_integrity(self):
        return True


def generate_stl10(data_dir, train, unlabeled):
    """Write an STL-10 of noise with that many pictures, a thousand at a time, and 512 test pictures."""
    folder = data_dir / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("unlabeled", unlabeled), ("test", 512)):
        with open(folder / f"{part}_X.bin", "wb") as file:
            for start in range(0, count, 1000):
                file.write(rng.bytes(min(1000, count - start) * pv.STL10_PICTURE))
        rng.integers(1, 11, count, np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{number}" for number in range(1, 11)))


def train_here(cfg):
    """Images a second of one epoch of the notebook's fit."""
    return pv.fit(cfg)[1][-1]["images_per_second"]


def train_as_usual(cfg):
    """Images a second of one epoch of the usual pipeline."""
    device = pv.find_device(cfg)
    steps = [transforms.Resize(cfg.image_size), transforms.ToTensor()]
    dataset = GeneratedSTL10(str(cfg.data_dir), "train", transform=transforms.Compose(steps))
    loader = DataLoader(dataset, cfg.batch_size, shuffle=True, num_workers=2, drop_last=True)
    vae = pv.VAE(cfg).to(device).train()
    optimizer = torch.optim.Adam(vae.parameters(), lr=cfg.lr)
    started = time.perf_counter()
    for images, _ in loader:
        images = images.to(device)
        logits, mu, logvar = vae(images)
        loss = pv.vae_loss(logits, images, mu, logvar, cfg.kl_weight).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    return len(loader) * cfg.batch_size / (time.perf_counter() - started)


def compare_training(scratch, arguments):
    """Alternate the two loops and print a row for each, and their ratio."""
    generate_stl10(scratch / "data", train=arguments.steps * BATCH_SIZE, unlabeled=1)
    speeds = {"this notebook": [], "usual pipeline": []}
    for repeat in range(arguments.repeats + 1):  # the first is for warming up
        for name, train in (("this notebook", train_here), ("usual pipeline", train_as_usual)):
            cfg = pv.Config(
                data_dir=scratch / "data",
                output_dir=scratch / "outputs",
                checkpoint_dir=scratch / "checkpoints",
                run_name=f"repeat-{repeat}",
                base_channels=arguments.base_channels,
                batch_size=BATCH_SIZE,
                epochs=1,
            )
            speeds[name].append(train(cfg))
    speeds = {name: values[1:] for name, values in speeds.items()}
    print(f"\ntraining, base width {arguments.base_channels}, batch {BATCH_SIZE}, {arguments.repeats} repeats")
    print(f"{'images/s':>16} {'min':>8} {'median':>8} {'max':>8}   the paper's 10.5 million images")
    for name, values in speeds.items():
        projected = PAPER_IMAGES / median(values)
        took = f"{projected / 60:.1f} min" if projected < 7200 else f"{projected / 3600:.1f} h"
        print(f"{name:>16} {min(values):8.1f} {median(values):8.1f} {max(values):8.1f}   {took}")
    print(f"{'ratio':>16} {'':>8} {median(speeds['this notebook']) / median(speeds['usual pipeline']):8.1f}")


LOAD = """
import resource, sys, time
import pegasus_vae as pv
cfg = pv.Config(data_dir=sys.argv[1], output_dir=sys.argv[2])
base, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
images = pv.load_images(cfg, "train+unlabeled")
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{len(images):,} images in {seconds:.1f} s, {(peak - base) / 1024:.0f} MB above {base / 1024:.0f} MB at the start")
"""


def run_python(*arguments, **keywords):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEGASUS_")}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, check=True, **keywords)


def prepare_data(scratch, arguments):
    """Print how long the cache of a whole STL-10 takes, and how much memory, the first and the second time."""
    train = arguments.images // 21  # STL-10's share
    generate_stl10(scratch / "large", train, arguments.images - train)
    for when in ("first start", "second start"):
        print(f"{when}: ", end="", flush=True)
        run_python("-c", LOAD, scratch / "large", scratch / "outputs", stderr=subprocess.DEVNULL)


def time_demo(scratch):
    """Print how long the demo takes."""
    started = time.perf_counter()
    run_python("pegasus_vae.py", "--output-dir", scratch / "demo", capture_output=True)
    print(f"demo: {time.perf_counter() - started:.1f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-channels", type=int, default=32, help="64 is the paper's size")
    parser.add_argument("--steps", type=int, default=20, help="training steps in a repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=105_000, help="size of the STL-10 whose cache is timed")
    arguments = parser.parse_args()
    device = pv.find_device(pv.Config())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores"
    print(f"{device} ({name}), {platform.machine()}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        compare_training(Path(scratch), arguments)
    with tempfile.TemporaryDirectory() as scratch:
        prepare_data(Path(scratch), arguments)
        time_demo(Path(scratch))


if __name__ == "__main__":
    main()
