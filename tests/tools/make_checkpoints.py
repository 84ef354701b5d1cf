"""Make the files that ship in checkpoints/ from a finished training run and the photographs it was trained on.

python tests/tools/make_checkpoints.py --data-dir DIR --checkpoint-dir RUNS --run-name paper "60,522 photographs"

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


def native(cfg, images):
    """Those of all test images that are not CIFAR-10's, which were enlarged from 32 pixels."""
    files = [
        file for file in sorted((cfg.data_dir / "test").rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png")
    ]
    if len(files) != len(images):
        raise SystemExit(f"{len(files)} files, {len(images)} images: which of them are of native size?")
    return images[[not file.name.startswith("cifar10_") for file in files]]


def main():
    *arguments, description = sys.argv[1:]
    cfg = pv.read_config(arguments)
    run = cfg.checkpoint_dir / "runs" / cfg.run_name
    vae, info = pv.load_checkpoint(run / "pegasus_vae.safetensors")
    history = pv.read_history(run / "history.csv")
    info["data"] = description
    layout = "_spatial" if vae.decoder.grid[1] > 1 else ""
    splits = {"all of test": None, "horse": "horse", "bird": "bird"}
    images = {name: pv.load_images(cfg, "test", class_name) for name, class_name in splits.items()}
    if pv.find_data(cfg) == "folder":
        images["native"] = native(cfg, images["all of test"])
        print(f"{len(images['native'])} of {len(images['all of test'])} test pictures are of native size")
    info["held_out"] = {name: pv.evaluate(vae, part).mean(dim=0).tolist() for name, part in images.items()}
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
