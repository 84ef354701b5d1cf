"""Make the files that ship in checkpoints/ from a finished training run and the photographs it was trained on.

python tests/tools/make_checkpoints.py --data-dir DIR --checkpoint-dir RUNS --run-name paper "105,000 photographs"

reads RUNS/runs/<run-name>/, measures the weights, as they ship, on the whole test split, and writes
pegasus_vae.safetensors, candidates.safetensors and history.csv to the repository's checkpoints/; of a model with a
latent grid pegasus_vae_spatial.safetensors and so on. What is chosen by hand is not made here: copy outputs/picks.json.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save

SHIPPED = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(SHIPPED.parent))

import pegasus_vae as pv  # noqa: E402


def native(cfg, count):
    """Which of the count test images are not CIFAR-10's, which were enlarged from 32 pixels; a list of bool."""
    files = [
        file for file in sorted((cfg.data_dir / "test").rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    if len(files) != count:
        raise SystemExit(f"{len(files)} files, {count} images: which of them are of native size?")
    return [not file.name.startswith("cifar10_") for file in files]


def main():
    *arguments, description = sys.argv[1:]
    cfg = pv.read_config(arguments)
    run = cfg.checkpoint_dir / "runs" / cfg.run_name
    vae, info = pv.load_checkpoint(run / "pegasus_vae.safetensors")
    history = pv.read_history(run / "history.csv")
    info["data"] = description
    layout = "_spatial" if vae.decoder.grid[1] > 1 else ""
    images, labels, classes = pv.load_split(cfg, "test")
    parts = {"all of test": slice(None)} | {name: labels == classes.index(name) for name in ("horse", "bird")}
    if pv.find_data(cfg) == "folder":
        parts["native"] = torch.tensor(native(cfg, len(images)))
        print(f"{parts['native'].sum()} of {len(images)} test pictures are of native size")
    values = pv.evaluate(vae, images)
    info["held_out"] = {name: values[part].mean(dim=0).tolist() for name, part in parts.items()}
    pv.save_checkpoint(SHIPPED / f"pegasus_vae{layout}.safetensors", vae, info)
    pv.save_history(SHIPPED / f"history{layout}.csv", history)

    candidates = {}
    for class_name in ("horse", "bird"):
        found = pv.load_candidates(cfg, vae, class_name)
        candidates[f"{class_name}_latents"] = found.latents.half()
        candidates[f"{class_name}_crc32"] = torch.tensor(found.crc32)
    content = save(candidates, {"weights": pv.weights_digest(vae)})
    pv.write_atomically(SHIPPED / f"candidates{layout}.safetensors", content)
    for name, (bce, floor, mse, psnr) in info["held_out"].items():
        print(f"{name}: BCE {bce:.4f}, floor {floor:.4f}, MSE {mse:.5f}, PSNR {psnr:.2f} dB")


if __name__ == "__main__":
    main()
