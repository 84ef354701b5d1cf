"""Train the recipe, and once for each change of one setting, all on the same smaller budget, and compare.

python tests/tools/make_ablations.py --data-dir DIR [--checkpoint-dir RUNS]

writes checkpoints/ablations.csv and checkpoints/ablations.png, which the notebook shows, after each training. What was
stopped goes on when the command is given again. Columns: numbers is the length of the code, kl in nats a dimension,
nats their product, the rate; spread is the standard deviation of the posterior means over 2,048 test pictures.
"""

import csv
import re
import sys
import zlib
from pathlib import Path

import torch

SHIPPED = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(SHIPPED.parent))

import pegasus_vae as pv  # noqa: E402

BUDGET = {"base_channels": 32, "max_images": 20_000, "epochs": 2, "seed": 0}
CHANGES = {
    "the recipe": {},
    "another seed": {"seed": 1},
    "KL weight 0": {"kl_weight": 0.0},
    "KL weight 0.001": {"kl_weight": 0.001},
    "true ELBO": {"kl_weight": 0.042},  # an effective beta of 1
    "KL weight 0.1": {"kl_weight": 0.1},
    "latent 128": {"latent_dim": 128},
    "blocks per stage 2": {"blocks_per_stage": 2},
    "grid 4x4x32": {"latent_size": 4},
    "grid 8x8x8": {"latent_size": 8},
    "grid 16x16x2": {"latent_size": 16},
    "grid 16x16x4": {"latent_size": 16, "latent_dim": 1024},
    # nearer the recipe's rate
    "grid 16x16x4, KL weight 0.1": {"latent_size": 16, "latent_dim": 1024, "kl_weight": 0.1},
}


def shipped_pairs(images):
    """Indices of four picked horses and birds, the best pairs first, and which of the birds have dark wings.

    images: {"horse": all of the test split, "bird": all}. ReaderError if the shipped picks are of other photographs.
    """
    crc32 = {name: [zlib.crc32(image.numpy().tobytes()) for image in part] for name, part in images.items()}
    picks = SHIPPED / "picks.json"
    choices = pv.PicksFile(picks, picks, crc32, 64, "").choices
    best = [position for positions in choices.best.values() for position in positions[::-1]]
    order = list(dict.fromkeys([*best, *range(0, len(choices.horse), 16)]))[:4]
    horse, bird = ([picked[position] for position in order] for picked in (choices.horse, choices.bird))
    return horse, bird, torch.tensor([index in choices.dark for index in bird])


def measure(cfg, horses, birds, dark, test):
    """Train by cfg; returns what the table says of it, and the row of pictures."""
    vae, history = pv.fit(cfg)
    if len(history) < cfg.epochs:
        raise SystemExit("stopped: give the command again to go on")
    bce, floor, _, psnr = pv.evaluate(vae, test).mean(dim=0).tolist()
    horse_mu, bird_mu = pv.encode_mean(vae, horses), pv.encode_mean(vae, birds)
    latents, kl = pv.encode_mean(vae, pv.evenly_spread(test, 2048)), history[-1]["kl"]
    torch.manual_seed(0)
    codes = torch.cat([horse_mu, pv.make_pegasus(horse_mu, bird_mu, dark), torch.randn(4, cfg.latent_dim)])
    record = {"parameters": sum(p.numel() for p in vae.parameters()), "numbers": cfg.latent_dim, "psnr": psnr}
    record |= {"above_floor": bce - floor, "kl": kl, "nats": kl * cfg.latent_dim}
    return record | {"spread": latents.std(dim=0).mean().item()}, pv.decode_images(vae, codes)


def main():
    cfg = pv.read_config(sys.argv[1:])
    cfg = cfg.model_copy(update={name: value for name, value in BUDGET.items() if name not in cfg.model_fields_set})
    test = pv.load_images(cfg, "test")
    images = {name: pv.load_images(cfg, "test", name) for name in ("horse", "bird")}
    horse, bird, dark = shipped_pairs(images)
    horses, birds = images["horse"][horse], images["bird"][bird]
    rows, table = {"photographs": torch.cat([horses, birds])}, []
    title = "Four reconstructions, four pegasi, four draws from the prior (first row: the horses and the birds)"
    for name, change in CHANGES.items():
        run_name = "ablation-" + re.sub(r"\W+", "-", name)
        record, rows[name] = measure(cfg.model_copy(update=change | {"run_name": run_name}), horses, birds, dark, test)
        table.append({"change": name} | record)
        print(table[-1], flush=True)
        with open(SHIPPED / "ablations.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
        pv.show_rows(SHIPPED / "ablations.png", rows, title, title, ["copy"] * 4 + ["pegasus"] * 4 + ["draw"] * 4)


if __name__ == "__main__":
    main()
