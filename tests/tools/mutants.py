"""Does the suite bite? Plant one fault at a time in a copy of the project, and require that the unit tests or else the
executed notebook fail.

python tests/tools/mutants.py [NAME ...]      prints a table and the count of faults that were caught; exit status 1 if
                                              any was not. As many are tried at a time as there are cores.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("model", "data", "pegasus", "choices", "config", "pickers", "prior", "training")  # the fast ones first

# part: {name: (what stands in pegasus_vae.py, exactly once; what the fault puts in its place)}; the tests of that part
# are run first, since they should catch it
FAULTS = {
    "model": {
        "KL sign": ("return -0.5 * (1 + logvar", "return 0.5 * (1 + logvar"),
        "sigma without the half": ("torch.exp(0.5 * logvar) * eps", "torch.exp(logvar) * eps"),
        "sum for mean": ('reduction=reduction)\n    kl', 'reduction="sum")\n    kl'),
        "KL not averaged": ("kl = kl / mu.shape[1]", "kl = kl"),
        "KL weight ignored": ("Loss(bce + kl_weight * kl,", "Loss(bce + kl,"),
        "shortcut dropped": ("self.main(x) + self.skip(x)", "self.main(x)"),
        "shortcut always convolved": ("            self.skip = nn.Identity()\n", "            pass\n"),
        "grid turned on its side": ("self.stages(z.unflatten(1, self.grid))", "self.stages(z.unflatten(1, self.grid).mT)"),
        "grid too coarse": ("side = cfg.image_size // 4", "side = cfg.image_size // 8"),
        "numbers not doubled": ("max(1, 2 * cfg.latent_dim // side**2)", "max(1, cfg.latent_dim // side**2)"),
        "eval() missing": ("    model.eval()\n    try:", "    try:"),
        "model left in another mode": ("        model.train(training)\n", "        pass\n"),
        "few CPUs in bfloat16": ('for name in ("amx_bf16", "avx512_bf16")', 'for name in ("amx_bf16",)'),
        "Gaussian without covariance": ("codes.T.cov() + jitter", "jitter"),
    },
    "data": {
        "rows for columns": ("source.transpose(2, 1, 0)", "source.transpose(1, 2, 0)"),
        "labels off by one": ("classes[label - 1]", "classes[label % len(classes)]"),
        "resize missing": ("ImageOps.fit(picture, (cfg.image_size,) * 2, Image.Resampling.BILINEAR)", "picture.crop((0, 0, cfg.image_size, cfg.image_size))"),
        "camera on its side": ("ImageOps.exif_transpose(picture).convert", "picture.convert"),
        "stale cache trusted": ('if file.metadata()["stamp"] == stamp:', "if True:"),
        "times of the files ignored": ("s.st_mtime_ns) for file", "0) for file"),
        "cache written over": ('write_atomically(cache, save(content, {"stamp"', 'Path.write_bytes(cache, save(content, {"stamp"'),
        "cache made twice": ('with FileLock(cache.with_suffix(".lock")):  # a second', "if True:  # a second"),
        "archive not checked": ("md5=STL10.tgz_md5", "md5=None"),
        "half-unpacked archive": ("extract_archive(str(archive), unpacked)", "extract_archive(str(archive), str(cfg.data_dir)); return"),
    },
    "training": {
        "learning rate constant": ("return cfg.lr * (1 - epoch / cfg.epochs)", "return cfg.lr"),
        "learning rate not set": ('optimizer.param_groups[0]["lr"] = learning_rate(cfg, run.epoch)', "pass"),
        "derivatives added up": ("    optimizer.zero_grad()  # or", "    pass  # or"),
        "max_images ignored": ("evenly_spread(images, cfg.max_images or len(images))", "evenly_spread(images, len(images))"),
        "same order in every epoch": ("manual_seed(self.cfg.seed * 10**9 + self.epoch)", "manual_seed(self.cfg.seed)"),
        "noise depends on restarts": ("seed(self.cfg.seed * 10**9 + position)", "pass"),
        "resume forgets the step": ('state["epoch"], state["step"], state["history"]', 'state["epoch"], 0, state["history"]'),
        "resume forgets the losses": ("                self.losses[: self.step] = losses\n", ""),
        "resume forgets Adam": ('                self.optimizer.load_state_dict(state["optimizer"])\n', ""),
        "resume without the lock": ('                    stack.enter_context(FileLock(self.folder / "lock", timeout=0))\n', "                    pass\n"),
        "lock let go at once": ('stack.enter_context(FileLock(self.folder / "lock", timeout=0))', 'FileLock(self.folder / "lock", timeout=0).acquire().lock.release()'),
        "recipe not compared": ("if before.get(k) != v]", "if False]"),
        "damaged state overwritten": ("        except FileNotFoundError:\n            return\n", "        except Exception:\n            return\n"),
        "pickle may run code": ("weights_only=True", "weights_only=False"),
        "spoiled state saved": ("if not all(weight.isfinite().all()", "if False and not all(weight.isfinite().all()"),
        "full disk ends the run": ("        except OSError as error:\n            print(f\"NOT saved", "        except ZeroDivisionError as error:\n            print(f\"NOT saved"),
        "half a file left behind": ("        temporary.unlink(missing_ok=True)\n", ""),
        "processes train on the same pictures": ("yield batch[RANK :: ranks()]", "yield batch"),
        "second process reports for the first": ("        if RANK > 0:\n            return\n        if not all", "        if not all"),
        "losses of one process only": ("dist.all_reduce(self.losses[self.step])", "pass"),
        "gradients not averaged": ("DistributedDataParallel(vae) if ranks() > 1 else vae", "vae"),
    },
    "choices": {
        "file not read before it is written": ("                    self.take_up()\n                    write", "                    write"),
        "file not locked": ('with FileLock(f"{self.path}.lock", timeout=10):', "if True:"),
        "unsaved changes dropped": ("[*self.unsaved, *changes], \"your own\"", "list(changes), \"your own\""),
        "unsaved changes lost to the file": ("            for change in self.unsaved:\n                choices.put(*change)\n", ""),
        "undo takes back the oldest": ("self.edit(*self.past.pop(), undoing=True)", "self.edit(*self.past.pop(0), undoing=True)"),
        "undone entry put last": ("return part, key, before, place", "return part, key, values.get(key), None"),
        "changed entry loses its place": ("place = list(values).index(key) if key in values else position", "place = position"),
        "undo does nothing": ("self.edit(*self.past.pop(), undoing=True)", "self.past.pop()"),
        "picks of other data accepted": ("        if choices.data != self.data:", "        if False:"),
        "damaged picks overwritten": ("now {self.path.replace(aside)}", "now {aside}"),
        "impossible picks kept": ("for index in getattr(self, part) if index in allowed", "for index in getattr(self, part)"),
        "unpicked bird stays dark": ('changes.append(("dark", index, None))', "pass"),
        "best kept with other parents": ('parents = json.dumps([self["horse"], self["bird"], sorted(self["dark"])])', "parents = json.dumps([])"),
        "two bests forgotten": ("best[-3:] or None", "best[-1:] or None"),
        "undo is a step itself": ("self.past += [] if undoing else", "self.past +="),
        "suggestions are saved": ("            if save:\n", "            if True:\n"),
        "stale picks handed over": ("        self.take_up()\n        for group in", "        for group in"),
        "most like turned round": ("wanted).argsort(descending=True, stable=True)", "wanted).argsort(stable=True)"),
    },
    "pickers": {
        "checkbox ignored": ("self.on_change(box, partial(self.picks.change, self.group, index))", "pass"),
        "clicks answered by recycled cells": ("        if index not in self.cells:", "        if True:"),
        "filter ignored": ('if show == "all" or (index in picked)', "if True or (index in picked)"),
        "negative is the bird itself": ("negative = (decode_images(vae, -birds", "negative = (decode_images(vae, birds"),
        "file says what the page shows": ("text = html.escape(text)", "text = text"),
        "callback fails in silence": ('                self.trouble = f"{type(error).__name__}: {error}"\n', "                pass\n"),
        "old pickers live on": ("            close_widgets(old, *old.cells.values())", "            pass"),
        "looking writes": ("if getattr(self.composition, field) != value:", "if True:"),
        "slider does not mend": ("if self.prior and composition.mend:", "if False:"),
        "page told of a passing value": ("            with widget.hold_sync():\n    ", "            if True:\n    "),
    },
    "pegasus": {
        "pictures lie on their side": ("axes.imshow(canvas.permute(1, 2, 0)", "axes.imshow(canvas.permute(2, 1, 0)"),
        "labels of rows turned round": ("for i in range(len(rows))], list(rows))", "for i in range(len(rows))], list(rows)[::-1])"),
        "numbers of a sheet wrong": ('rows = {f"{columns * row} +"', 'rows = {f"{row} +"'),
        "weights exchanged": ("return horse_weight * horse_mu + (1 - horse_weight)", "return (1 - horse_weight) * horse_mu + horse_weight"),
        "flip not applied": ("sign = 1 - 2 *", "sign = 1 - 0 *"),
        "norm not restored": ("return z * (length / z.norm", "return z * (z.norm(dim=1) / z.norm"),
        "arc the other way round": ("horse_part = torch.sin(horse_weight * angle)", "horse_part = torch.sin((1 - horse_weight) * angle)"),
        "spatial codes of the paper's model": ('layout = "_spatial" if', 'layout = "" if'),
        "codes of other weights": ("    if weights != weights_digest(vae):", "    if False:"),
        "mask ignored": ("chosen * (cover > 0.05)", "1.0 * (cover > 0.05)"),
        "empty cells mixed": ("chosen * (cover > 0.05)", "chosen"),
        "border not soft": ("F.avg_pool2d(chosen, 3, stride=1, padding=1, count_include_pad=False)", "chosen"),
        "sky not taken off": ("chosen * (bird - sky + cover", "chosen * (bird + cover"),
        "wing laid over the horse": ("+ cover * (sky - horse))", ")"),
        "wing put in whole": ("+ cover * (sky - horse))", "+ (sky - horse))"),
        "composed bird not negated": ("sign * encode_mean(vae, placed), sign", "encode_mean(vae, placed), sign"),
        "sky not negated": ("sign * encode_mean(vae, background", "encode_mean(vae, background"),
        "wings not moved": ("[round(composition.right * step),", "[0,"),
        "mirror ignored": ("flip(2) if composition.mirror else", "flip(2) if False else"),
        "turned the other way": ('"angle": composition.turn', '"angle": -composition.turn'),
        "black comes in from outside": ("(sky + affine(x - sky,", "(affine(x,"),
        "wing not tinted": ("tint * cover * (mean_code(horse, back)", "0 * cover * (mean_code(horse, back)"),
        "tint by all of the horse": ("back = chosen_blocks([c.back for c in compositions], side)", "back = torch.ones_like(chosen)"),
        "tint of the wing's edge too strong": ("tint * cover * (mean", "tint * (mean"),
        "tint by the mean of covered and bare cells": ("mean_code(bird, chosen * cover)", "mean_code(bird, chosen)"),
        "tint by the mean of all cells": ("mean_code(bird, chosen * cover)", "mean_code(bird, torch.ones_like(cover))"),
        "mirror images are not compared with": ("for x in (part, part.flip(3)))", "for x in (part, part))"),
    },
    "config": {
        "tilde taken for a name": ("AfterValidator(Path.expanduser)", "AfterValidator(Path)"),
        "all processes on one GPU": ('int(os.environ.get("LOCAL_RANK", 0))', "0"),
        "any GPU under torchrun": ('if "LOCAL_RANK" in os.environ and', "if False and"),
        "refusals with a traceback": ("def _render_traceback_(self)", "def _render_trace_(self)"),
        "no look whether one can write": ('    check_writable(cfg.output_dir, "PEGASUS_OUTPUT_DIR")\n', ""),
    },
    "prior": {
        "velocity towards the noise": ("velocity.float(), z - eps)", "velocity.float(), eps - z)"),
        "time reversed": ("z_t = (1 - t[:, None]) * eps + t[:, None] * z", "z_t = t[:, None] * eps + (1 - t[:, None]) * z"),
        "all times alike": ("t = torch.sigmoid(torch.randn(len(z), device=z.device))", "t = torch.rand(len(z), device=z.device)"),
        "untrained prior moves": ("        nn.init.zeros_(self.to_velocity.bias)\n", ""),
        "positions unknown": ("x = x.flatten(2).mT + self.positions", "x = x.flatten(2).mT"),
        "time unknown": ("angles = t[:, None] * self.frequencies", "angles = 0 * t[:, None] * self.frequencies"),
        "class unknown": ("dim=1)) + self.embed_class(labels)", "dim=1))"),
        "attention not scaled": ("queries @ keys.mT / keys.shape[-1] ** 0.5", "queries @ keys.mT"),
        "mean of the codes not restored": ("self.grid) * self.deviation + self.mean)", "self.grid) * self.deviation)"),
        "guidance ignored": ("return anywhere + guidance * (towards - anywhere)", "return towards"),
        "guidance away from the class": ("guidance * (towards - anywhere)", "guidance * (anywhere - towards)"),
        "labels of drawn classes off by one": ("label = prior.classes.index(class_name) + 1 if", "label = prior.classes.index(class_name) if"),
        "labels of codes off by one": ("[classes.index(name) + 1 if name in classes", "[classes.index(name) if name in classes"),
        "unknown class drawn": ("if class_name and class_name not in prior.classes:", "if False:"),
        "codes of any length mended": ("if z.shape[1:] != (math.prod(prior.grid),):", "if False:"),
        "one label for all": ("y = torch.cat([torch.zeros_like(batch), labels[known]])", "y = torch.zeros_like(torch.cat([batch, known]))"),
        "labels left on all": ("y = torch.cat([torch.zeros_like(batch), labels[known]])", "y = labels[torch.cat([batch, known])]"),
        "horses and birds as rare as others": ("1 + 4 * torch.isin(", "1 + 0 * torch.isin("),
        "birds as rare as others": ('+ 1 for name in ("horse", "bird") if', '+ 1 for name in ("horse",) if'),
        "rate that rises for ever": (" * min(1, (done * run.steps + 1) / 500)", " * (done * run.steps + 1) / 500"),
        "rate of the prior fixed": ('"lr": 2.5 * cfg.lr})', '"lr": 1e-3})'),
        "one mean for all channels": ("prior.mean.copy_(sample.mean(dim=(0, 2, 3))[:, None, None])", "prior.mean.fill_(sample.mean())"),
        "averaged weights not returned": ("return average.module.eval(), run.history", "return prior.eval(), run.history"),
        "averaged weights not exported": ('run.export("prior.safetensors", average.module,', 'run.export("prior.safetensors", prior,'),
        "averaged weights not saved": ('nn.ModuleDict({"prior": prior, "average": average}).to(device)', 'nn.ModuleDict({"prior": prior}).to(device)'),
        "averaged weights not measured": ("flow_matching_loss(average, z, test_labels)", "flow_matching_loss(prior, z, test_labels)"),
        "mirrored pictures not encoded": ("encode_mean(vae, part.flip(3))", "encode_mean(vae, part)"),
        "mirrored codes not used": ("mirrored = torch.randint(2, y.shape, device=device)", "mirrored = torch.zeros_like(y)"),
        "codes cached for all weights": ("{split}-{weights_digest(vae)}-{zlib.crc32(", "{split}-{zlib.crc32("),
        "codes cached for all pictures": ("{split}-{weights_digest(vae)}-{zlib.crc32(images.numpy()):08x}", "{split}-{weights_digest(vae)}"),
        "torn codes not made anew": ("with suppress(FileNotFoundError, SafetensorError), safe_open", "with suppress(FileNotFoundError), safe_open"),
        "prior on an odd grid": ("if vae.decoder.grid[1] % 2:", "if False:"),
        "noise not seeded": ("generator=torch.Generator().manual_seed(seed)).to(device)", "generator=None).to(device)"),
        "strength ignored": ("z_t = (1 - times[0]) * eps + times[0] * known", "z_t = eps"),
        "cells to mend ignored": ("    if cells is not None:\n        free", "    if False:\n        free"),
        "kept cells left to the flow": ("torch.where(free, z_t, (1 - after) * eps + after * known)", "z_t"),
        "kept cells rounded": ("torch.where(free.cpu(), prior.restore(z_t).cpu(), z)", "prior.restore(z_t).cpu()"),
        "any strength": ("    if not 0 <= strength <= 1:\n        raise ReaderError(f\"strength", "    if False:\n        raise ReaderError(f\"strength"),
        "mended too widely": ("for c in compositions], side), 3, stride=1, padding=1)[:, 0]", "for c in compositions], side), 5, stride=1, padding=2)[:, 0]"),
        "prior trained on all pictures": ("cfg.max_images or len(part)", "len(part)"),
        "evidence turned round": ("(errors[0] - errors[1:])", "(errors[1:] - errors[0])"),
        "evidence for the bird ignored": ("in (light, wing, horse))", "in (light, horse))"),
        "evidence for the horse ignored": ("in (light, wing, horse))", "in (light, wing))"),
        "evidence for light ignored": ("in (light, wing, horse))", "in (wing, horse))"),
        "its own wing among the proposals": ("shifts = range(1, min(13, count))", "shifts = range(0, min(12, count))"),
        "wings of the wrong horse": ("* count + torch.arange(count)  # proposal", "* count  # proposal"),
        "Euler for midpoint": ("velocity(prior, half, middle, label, guidance)", "velocity(prior, z_t, t, label, guidance)"),
    },
}  # fmt: skip
MUTANTS = {name: fault for faults in FAULTS.values() for name, fault in faults.items()}


def plant(name):
    """The text of pegasus_vae.py with this fault."""
    if name not in MUTANTS:
        raise SystemExit(f"there is no fault {name!r}, only {', '.join(MUTANTS)}")
    old, new = MUTANTS[name]
    text = (ROOT / "pegasus_vae.py").read_text()
    if text.count(old) != 1:
        raise SystemExit(f"{name!r} no longer fits: {text.count(old)} places read {old!r}")
    return text.replace(old, new)


def unit_tests(name=None):
    """The files of unit tests, first that of the part that has the fault of this name."""
    return [f"tests/test_{part}.py" for part in sorted(PARTS, key=lambda part: name not in FAULTS.get(part, {}))]


def who_catches(text, tests, folder):
    """What fails in a copy of the project, made in folder, with this text of pegasus_vae.py: "unit tests", the files of
    tests, which are run first, "notebook", or None."""
    ignored = shutil.ignore_patterns(".git", "outputs", "data", "runs", "__pycache__", "*.safetensors")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "pegasus_vae.py").write_text(text)
    run = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.run([sys.executable, "-m", "pytest", "-n", "0", *tests], **run).returncode:
        return "unit tests"
    subprocess.run([sys.executable, "-m", "jupytext", "--to", "notebook", "pegasus_vae.py"], check=True, **run)
    smoke = [sys.executable, "-m", "pytest", "-n", "0", "-p", "tests.conftest", "pegasus_vae.ipynb"]
    return "notebook" if subprocess.run(smoke, **run).returncode else None


def examine(name):
    """who_catches this fault (or the text as it is, for None), and the seconds it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        text = plant(name) if name else (ROOT / "pegasus_vae.py").read_text()
        return who_catches(text, unit_tests(name), Path(scratch) / "project"), time.perf_counter() - started


def main():
    chosen = sys.argv[1:] or list(MUTANTS)
    for name in chosen:
        plant(name)  # all of them fit, or nothing is begun
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        healthy, *results = [pool.submit(examine, name) for name in (None, *chosen)]
        for name, result in zip(chosen, results):
            by, seconds = result.result()
            print(f"{name:38} {f'caught by {by}' if by else 'SURVIVED':24} {seconds:5.1f} s", flush=True)
    if healthy.result()[0]:
        raise SystemExit(f"the {healthy.result()[0]} fail without any fault: mend them first, the table means nothing")
    caught = sum(result.result()[0] is not None for result in results)
    print(f"{caught} of {len(chosen)} faults were caught")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
