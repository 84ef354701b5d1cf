"""Train the recipe once and once for each change of one setting, all on the same smaller budget, and compare.

python tests/tools/make_ablations.py --data-dir DIR [--checkpoint-dir RUNS]

writes checkpoints/ablations.csv and checkpoints/ablations.png, which the notebook shows. A stopped run goes on when the
command is given again.
"""

import csv
import json
import sys
import zlib
from pathlib import Path

import torch

SHIPPED = Path(__file__).parents[2] / "checkpoints"
sys.path.insert(0, str(SHIPPED.parent))

import pegasus_vae as pv  # noqa: E402

BUDGET = {"base_channels": 32, "max_images": 20_000, "epochs": 2}
CHANGES = {
    "the recipe": {},
    "KL weight 0": {"kl_weight": 0.0},
    "KL weight 0.001": {"kl_weight": 0.001},
    "KL weight 0.1": {"kl_weight": 0.1},
    "latent 128": {"latent_dim": 128},
    "latent 8 on 8x8": {"latent_size": 8},
    "blocks per stage 2": {"blocks_per_stage": 2},
    "blocks per stage 3": {"blocks_per_stage": 3},
}


def shipped_pairs(horses, birds):
    """Indices of six picked horses and birds, the best pair first, and which of the birds have dark wings."""
    picks = json.loads((SHIPPED / "picks.json").read_text())
    best = next(iter(picks["best"].values()))["indices"][-1]
    order = [best, *(i for i in range(0, len(picks["horse"]), 11) if i != best)][:6]
    for images, group in ((horses, "horse"), (birds, "bird")):
        for pick in (picks[group][i] for i in order):
            if pick["index"] >= len(images) or zlib.crc32(images[pick["index"]].numpy().tobytes()) != pick["crc32"]:
                raise SystemExit(f"the shipped picks are not of these photographs: {group} {pick['index']} differs")
    horse, bird = ([picks[group][i]["index"] for i in order] for group in ("horse", "bird"))
    return horse, bird, torch.tensor([bool(picks["bird"][i].get("dark")) for i in order])


def main():
    cfg = pv.read_config(sys.argv[1:]).model_copy(update=BUDGET)
    pv.cfg = cfg  # of show_rows
    test = pv.load_images(cfg, "test")
    horses, birds = (pv.load_images(cfg, "test", name) for name in ("horse", "bird"))
    horse, bird, dark = shipped_pairs(horses, birds)
    rows, table = {"photographs": torch.cat([horses[horse], birds[bird]])}, []
    for name, change in CHANGES.items():
        changed = cfg.model_copy(update=change | {"run_name": "ablation-" + name.replace(" ", "-").replace(".", "_")})
        vae, history = pv.fit(changed)
        if len(history) < cfg.epochs:
            raise SystemExit("stopped: give the command again to go on")
        bce, floor, _, psnr = pv.evaluate(vae, test).mean(dim=0).tolist()
        horse_mu, bird_mu = pv.encode_mean(vae, horses[horse]), pv.encode_mean(vae, birds[bird])
        latents = pv.encode_mean(vae, pv.evenly_spread(test, 2048))
        pegasi = pv.decode_images(vae, pv.make_pegasus(horse_mu, bird_mu, dark))
        torch.manual_seed(0)
        prior = pv.decode_images(vae, torch.randn(6, changed.latent_dim))
        rows[name] = torch.cat([pv.decode_images(vae, horse_mu), pegasi, prior])
        record = {"change": name, "parameters": sum(p.numel() for p in vae.parameters()), "psnr": psnr}
        record |= {"above_floor": bce - floor, "kl": history[-1]["kl"], "spread": latents.std(dim=0).mean().item()}
        table.append(record)
        print(table[-1], flush=True)
    with open(SHIPPED / "ablations.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    title = "Six reconstructions, six pegasi, six draws from the prior (first row: the horses and the birds)"
    pv.show_rows(rows, "ablations", "", title)
    (SHIPPED / "ablations.png").write_bytes((cfg.output_dir / "ablations.png").read_bytes())


if __name__ == "__main__":
    main()
