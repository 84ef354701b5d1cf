"""Does the suite bite? Plant one fault at a time in a copy of the project and require that the suite fails.

python tests/tools/mutants.py [NAME ...]      prints a table and the count of faults that were caught; exit status 1 if any was not
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNIT_TESTS = [
    f"tests/test_{part}.py" for part in ("compose", "config", "data", "model", "pegasus", "picks", "training")
]

# name: (what stands in pegasus_vae.py, exactly once; what the fault puts in its place)
MUTANTS = {
    "KL sign": ("return -0.5 * (1 + logvar", "return 0.5 * (1 + logvar"),
    "weights exchanged": ("return horse_weight * horse_mu + (1 - horse_weight)", "return (1 - horse_weight) * horse_mu + horse_weight"),
    "bird and horse exchanged": ("pegasus_mu = make_pegasus(horse_mu, bird_mu,", "pegasus_mu = make_pegasus(bird_mu, horse_mu,"),
    "eval() missing": ("    vae.eval()\n    try:", "    try:"),
    "shortcut dropped": ("self.main(x) + self.skip(x)", "self.main(x)"),
    "sum for mean": ('reduction=reduction)\n    kl', 'reduction="sum")\n    kl'),
    "KL not averaged": ("kl = kl / mu.shape[1]", "kl = kl"),
    "flip not applied": ("sign = 1 - 2 *", "sign = 1 - 0 *"),
    "resize missing": ("ImageOps.fit(picture, (cfg.image_size,) * 2, Image.Resampling.BILINEAR)", "picture.crop((0, 0, cfg.image_size, cfg.image_size))"),
    "rows for columns": ("picture.transpose(2, 1, 0)", "picture.transpose(1, 2, 0)"),
    "labels off by one": ("classes[label - 1]", "classes[label % len(classes)]"),
    "stale cache trusted": ("[(str(file.relative_to(cfg.data_dir)), s.st_size, s.st_mtime_ns)", "[str(file.relative_to(cfg.data_dir))"),
    "torn cache trusted": ("if whole and found.st_mtime_ns", "if True or found.st_mtime_ns"),
    "learning rate constant": ("return cfg.lr * (1 - epoch / cfg.epochs)", "return cfg.lr"),
    "same order in every epoch": ("manual_seed(cfg.seed * 10**9 + run.epoch)", "manual_seed(cfg.seed)"),
    "noise depends on restarts": ("random.manual_seed(cfg.seed * 10**9 + position)", "pass"),
    "resume forgets the step": ('state["epoch"], state["step"], state["history"]', 'state["epoch"], 0, state["history"]'),
    "resume forgets Adam": ('        self.optimizer.load_state_dict(state["optimizer"])\n', ""),
    "recipe not compared": ("        if differ:", "        if False:"),
    "pickle may run code": ("weights_only=True", "weights_only=False"),
    "losses not checked": ("        self.check()\n        record", "        record"),
    "max_images ignored": ("evenly_spread(images, cfg.max_images or len(images))", "evenly_spread(images, len(images))"),
    "sigma without the half": ("torch.exp(0.5 * logvar) * eps", "torch.exp(logvar) * eps"),
    "checksum of picks ignored": ('crc32[index] != entry.get("crc32") or ', ""),
    "unpicked bird stays dark": ('[bird for bird in groups["dark"] if bird in groups["bird"]]', 'groups["dark"]'),
    "picks not written": ('json.dumps(content, indent=1).encode()', "b'{}'"),
    "undo does nothing": ("self.chosen = self.past.pop()", "self.past.pop()"),
    "checkbox ignored": ("        self.kept.change(self.group, index, picked)\n", ""),
    "two notebooks overwrite each other": ("if theirs and theirs != self.known[1]:", "if False:"),
    "removed pick comes back in a merge": ("if index not in removed] + added", "] + added"),
    "undo reaches behind a merge": ("merge(self.known[0], self.chosen, understood), []", "merge(self.known[0], self.chosen, understood), self.past"),
    "suggestions crowd out a file": ("            self.known = self.chosen, None\n", ""),
    "clicks answered by recycled cells": ("        if index not in self.cells:\n            picture", "        if True:\n            picture"),
    "filter ignored": ('if self.show.value == "all":', 'if True:'),
    "negative is the bird itself": ("negative = (decode_images(vae, -birds", "negative = (decode_images(vae, birds"),
    "most like turned round": ("wanted).argsort(descending=True, stable=True)", "wanted).argsort(stable=True)"),
    "file says what the page shows": ("html.escape(text)", "text"),
    "half a file left behind": ("        temporary.unlink(missing_ok=True)\n", ""),
    "torn file kept as the one before": ("keep=self.previous if self.good else None", "keep=self.previous"),
    "unreadable now is taken for damaged": ("except (OSError, MemoryError) as error:", "except ZeroDivisionError as error:"),
    "processes train on the same pictures": ("batch[RANK::RANKS]", "batch"),
    "second process reports for the first": ("        if RANK > 0:\n            return\n        self.check()", "        self.check()"),
    "losses of one process only": ("                    dist.all_reduce(run.losses[run.step])", "                    pass"),
    "gradients not averaged": ("DistributedDataParallel(vae) if RANKS > 1 else vae", "vae"),
    "lock not taken": ("with FileLock(folder / \"lock\", timeout=0):", "if True:"),
    "threads do not wait for each other": ("with self.lock:\n            impossible", "if True:\n            impossible"),
    "best kept with other parents": ('return merged | {"best": merged["best"][-3:] if same else []}', 'return merged | {"best": merged["best"][-3:]}'),
    "best of another model destroyed": ('content["best"] = dict(self.bests)', 'content["best"] = {}'),
    "stale picks handed over": ("            self.take_up()\n            for group", "            for group"),
    "callback fails in silence": ('                self.trouble = f"{type(error).__name__}: {error}"\n', "                pass\n"),
    "old pickers live on": ("            Controls.latest[name].discard()", "            pass"),
    "grid turned on its side": ("z.unflatten(1, self.grid)", "z.unflatten(1, self.grid).mT"),
    "norm not restored": ("return z * (length / z.norm", "return z * (z.norm(dim=1) / z.norm"),
    "mask inverted": ("torch.where(mask, 1.0, shares)", "torch.where(mask, shares, 1.0)"),
    "border not soft": ("torch.where(mask, 1.0, shares)", "mask.float()"),
    "wings not moved": ("composition.right * cell)", "0 * cell)"),
    "mirror ignored": ("flip(3) if composition.mirror else", "flip(3) if False else"),
    "composed bird not negated": ("-1.0 if c.dark_winged else 1.0", "1.0"),
    "horse's weight ignored": ("[1 - c.horse_weight for c in compositions]", "[1.0 for c in compositions]"),
    "undone composition comes back": ("if horse in mine or horse not in base}", "}"),
    "checksum of compositions ignored": ("known != (horse_crc32, bird_crc32) or ", ""),
    "cells in another order": ("z.unflatten(1, grid).flatten(2).transpose(1, 2)", "z.unflatten(1, grid).mT.flatten(2).transpose(1, 2)"),
    "looking writes": ("        if changed != self.composition:", "        if True:"),
    "spatial codes of the paper's model": ('layout = "_spatial" if', 'layout = "" if'),
    "two bests forgotten": ('list(dict.fromkeys(indices))[-3:]', 'indices[-1:]'),
}  # fmt: skip


def is_caught(old, new, folder):
    """Plant the fault in a copy of the project in folder and run the unit tests, then the notebook."""
    ignored = shutil.ignore_patterns(".git", "outputs", "data", "runs", "__pycache__", "*.safetensors")
    shutil.copytree(ROOT, folder, ignore=ignored)
    script = folder / "pegasus_vae.py"
    text = script.read_text()
    if text.count(old) != 1:
        raise SystemExit(f"the fault no longer fits, {text.count(old)} places read {old!r}")
    script.write_text(text.replace(old, new))
    run = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([sys.executable, "-m", "pytest", *UNIT_TESTS], **run).returncode:
        return "unit tests"
    subprocess.run([sys.executable, "-m", "jupytext", "--to", "notebook", "pegasus_vae.py"], check=True, **run)
    smoke = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "pegasus_vae.ipynb"]
    return "notebook" if subprocess.run(smoke, **run).returncode else None


def main():
    chosen = sys.argv[1:] or list(MUTANTS)
    survivors = 0
    for name in chosen:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            by = is_caught(*MUTANTS[name], Path(scratch) / "project")
        survivors += by is None
        print(
            f"{name:28} {'caught by ' + by if by else 'SURVIVED':24} {time.perf_counter() - started:5.1f} s", flush=True
        )
    print(f"{len(chosen) - survivors} of {len(chosen)} faults were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
