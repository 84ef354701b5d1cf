"""Make the files that ship in checkpoints/ from a finished training run and the photographs it was trained on.

python tests/tools/make_checkpoints.py --data-dir DIR --checkpoint-dir RUNS --run-name paper "60,522 photographs"

reads RUNS/runs/<run-name>/, measures the weights, as they ship, on the whole test split, and writes
pegasus_vae.safetensors, candidates.safetensors and history.csv to the repository's checkpoints/; of a model with a
latent grid pegasus_vae_spatial.safetensors and so on. What is made by hand is not made here: copy outputs/picks.json
and outputs/compositions.json.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save

SHIPPED = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(SHIPPED.parent))

import pegasus_vae as pv  # noqa: E402


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
