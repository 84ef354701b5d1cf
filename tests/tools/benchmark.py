"""Measure what the notebook claims about speed; nothing here is asserted, everything is printed.

python tests/tools/benchmark.py [--base-channels 32] [--repeats 3] [--images 105000]

1. Training, images/s: from the usual pipeline (torchvision's STL10 with PIL Resize and ToTensor, DataLoader with two
   workers, float32, default memory layout, eager, loss.item() at each step) to the notebook's fit, one change at a time,
   same model, same batch size, in one run.
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
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import STL10

ROOT = Path(__file__).parents[2]
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
                file.write(rng.bytes(min(1000, count - start) * 3 * 96 * 96))
        rng.integers(1, 11, count, np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class{number}" for number in range(1, 11)))


def train_here(cfg):
    """The notebook's fit: images a second, and seconds an epoch for evaluating and saving, medians without the first
    epoch, in which memory is found."""
    ends = []
    _, history = pv.fit(cfg, on_epoch=lambda *_: ends.append(time.perf_counter()))
    between = [end - start - record["seconds"] for start, end, record in zip(ends, ends[1:], history[1:])]
    return median(record["images_per_second"] for record in history[1:]), median(between)


# From the usual pipeline to the notebook's, one change at a time; the last row is fit itself.
STEPS = ["images as bytes on the device", "channels_last", "bfloat16", "fused Adam, losses read at the end"]
COMPILED = "compiled, CUDA graphs"


def usual_loss(cfg, vae, taken, x):
    """The loss of a batch, eager, in bfloat16 only where that is among the steps taken."""
    if "bfloat16" in taken:
        return pv.batch_loss(vae, x, cfg)
    logits, mu, logvar = vae(x)
    return pv.vae_loss(logits, x, mu, logvar, cfg.kl_weight, cfg.reduction)


def train_with(cfg, taken):
    """Images a second of one epoch of the usual pipeline with the steps in taken, the first few batches not counted."""
    device = pv.find_device(cfg)
    resize = transforms.Compose([transforms.Resize(cfg.image_size), transforms.ToTensor()])
    dataset = GeneratedSTL10(str(cfg.data_dir), "train", transform=resize)
    count = len(dataset) // cfg.batch_size
    vae = pv.VAE(cfg).to(device).train()
    if "channels_last" in taken:
        vae = vae.to(memory_format=torch.channels_last)
    fused = "fused Adam, losses read at the end" in taken
    optimizer = torch.optim.Adam(vae.parameters(), lr=cfg.lr, fused=fused or None)
    loss_of = pv.loss_function(cfg, vae, steps=10**6) if COMPILED in taken else partial(usual_loss, cfg, vae, taken)
    if "images as bytes on the device" in taken:
        images = pv.load_images(cfg, "train").to(device)
        order = torch.randperm(len(images), device=device)[: count * cfg.batch_size]
        batches = (images[batch].float() / 255 for batch in order.split(cfg.batch_size))
    else:
        loader = DataLoader(dataset, cfg.batch_size, shuffle=True, num_workers=2, drop_last=True)
        batches = (images.to(device) for images, _ in loader)
    losses = []
    for step, x in enumerate(batches):
        if "channels_last" in taken:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = pv.learning_step(loss_of, optimizer, x).total
        losses.append(loss.detach().clone() if fused else loss.item())
        if step == count // 5:
            losses[-1] = float(losses[-1])  # waits for the device
            started = time.perf_counter()
    losses[-1] = float(losses[-1])
    return (count - count // 5 - 1) * cfg.batch_size / (time.perf_counter() - started)


def compare_training(scratch, arguments):
    """Measure every stage between the two loops, all in turn, and print a row for each and the ratio of the ends."""
    device = pv.find_device(pv.Config())
    count, epochs = (1000, 4) if device.type == "cuda" else (25, 2)
    generate_stl10(scratch / "data", train=count * BATCH_SIZE, unlabeled=1)
    steps = STEPS + [COMPILED] * (device.type == "cuda")
    speeds, between = {"the usual pipeline": []} | {f"+ {step}": [] for step in steps} | {"fit": []}, []
    for repeat in range(arguments.repeats):
        cfg = pv.Config(
            data_dir=scratch / "data",
            output_dir=scratch / "outputs",
            checkpoint_dir=scratch / "checkpoints",
            run_name=f"repeat-{repeat}",
            base_channels=arguments.base_channels,
            batch_size=BATCH_SIZE,
            epochs=epochs,
        )
        for taken, values in enumerate(list(speeds.values())[:-1]):
            values.append(train_with(cfg, steps[:taken]))
        speed, pause = train_here(cfg)
        speeds["fit"].append(speed)
        between.append(pause)
    print(f"\ntraining, base width {arguments.base_channels}, batch {BATCH_SIZE}, {arguments.repeats} repeats\n")
    print(f"| {'images/s':38} |   min | median |   max | gain | the paper's 10.5 million images |")
    print(f"| {'---':38} | ----: | -----: | ----: | ---: | ---: |")
    first = median(speeds["the usual pipeline"])
    for name, values in speeds.items():
        projected = PAPER_IMAGES / median(values)
        took = f"{projected / 60:.1f} min" if projected < 7200 else f"{projected / 3600:.1f} h"
        gain = f"{median(values) / first:4.1f}"
        print(f"| {name:38} | {min(values):5.0f} | {median(values):6.0f} | {max(values):5.0f} | {gain} | {took:>7} |")
    print(
        f"\nfit takes {median(between):.1f} s more an epoch to evaluate 512 images and to save: over the paper's 100 epochs"
    )
    print(f"{median(between) * 100 / 60:.1f} min")


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
