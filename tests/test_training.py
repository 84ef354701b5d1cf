"""Training that can be stopped anywhere and resumed exactly, and files that are whole or refused."""

import csv
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import save_file

from conftest import Crash, crash, press_stop, timeless

SETTINGS = {"image_size": 32, "kl_weight": 0.1}  # ten steps in two epochs, less than half a second


@pytest.fixture
def cfg(cfg):
    return cfg.model_copy(update=SETTINGS)


@pytest.fixture
def run(cfg):
    """The folder of the training run."""
    return cfg.checkpoint_dir / "runs" / cfg.run_name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Settings, model and history of a run that nothing disturbed. It is only read."""
    import pegasus_vae

    folder = tmp_path_factory.mktemp("uninterrupted")
    cfg = pegasus_vae.Config(output_dir=folder / "outputs", checkpoint_dir=folder / "checkpoints", **SETTINGS)
    return cfg, *pegasus_vae.fit(cfg)


@pytest.fixture
def assert_same(uninterrupted):
    """assert_same(fit(cfg)): the outcome is the uninterrupted run's, to the last bit."""

    def assert_same(outcome):
        vae, history = outcome
        expected = uninterrupted[1].state_dict()
        different = [name for name, t in vae.state_dict().items() if not torch.equal(t, expected[name])]
        assert different == []
        assert timeless(history) == timeless(uninterrupted[2])

    return assert_same


@pytest.fixture
def at_step(pv, monkeypatch):
    """at_step(n, act): call act(loss) when the loss of the n-th training step from now is computed; what it returns,
    if anything, is the loss. The step's forward pass has been made then, its weights are not yet changed."""

    def at_step(number, act):
        original, count = pv.vae_loss, iter(range(1, 10**6))

        def vae_loss(*arguments):
            loss = original(*arguments)
            return (act(loss) or loss) if next(count) == number else loss

        monkeypatch.setattr(pv, "vae_loss", vae_loss)

    return at_step


def test_the_learning_rate_falls_linearly_from_its_first_value_towards_zero(pv):
    cfg = pv.Config(lr=4e-4, epochs=100)
    assert pv.learning_rate(cfg, 0) == 4e-4
    assert pv.learning_rate(cfg, 50) == pytest.approx(2e-4)
    assert pv.learning_rate(cfg, 99) == pytest.approx(4e-6)


def test_each_epoch_is_trained_at_its_learning_rate(pv, cfg, monkeypatch):
    rates, step = [], torch.optim.Adam.step
    monkeypatch.setattr(pv, "learning_rate", lambda cfg, epoch: [1e-3, 0.0][epoch])
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *more: rates.append(self.param_groups[0]["lr"]) or step(self, *more)
    )
    pv.fit(cfg)
    assert rates == [1e-3] * 5 + [0.0] * 5


def test_training_learns(pv, cfg):
    _, history = pv.fit(cfg.model_copy(update={"epochs": 6, "batch_size": 10, "lr": 2e-3}))
    assert history[-1]["bce"] < history[0]["bce"] - 0.02
    assert history[-1]["test_psnr"] > history[0]["test_psnr"] + 0.5


def test_each_epoch_has_a_complete_record(pv, uninterrupted):
    cfg, _, history = uninterrupted
    columns = "epoch lr bce kl test_bce test_floor test_mse test_psnr seconds images_per_second".split()
    assert [list(record) for record in history] == [columns, columns]
    assert [record["epoch"] for record in history] == [1, 2]
    assert [record["lr"] for record in history] == [cfg.lr, cfg.lr / 2]
    assert all(math.isfinite(value) for record in history for value in record.values())
    assert all(record["test_bce"] > record["test_floor"] for record in history)
    assert pv.read_history(cfg.checkpoint_dir / "runs" / cfg.run_name / "history.csv") == history


def test_the_held_out_values_are_those_of_the_model_after_the_epoch(pv, uninterrupted):
    cfg, vae, history = uninterrupted
    values = pv.evaluate(vae, pv.load_images(cfg, "test")).mean(dim=0)
    assert [history[-1][f"test_{name}"] for name in ("bce", "floor", "mse", "psnr")] == pytest.approx(values.tolist())


def test_a_finished_run_is_returned_as_it_is_and_in_evaluation_mode(pv, uninterrupted, assert_same, at_step):
    at_step(1, crash)
    outcome = pv.fit(uninterrupted[0])
    assert_same(outcome)
    assert not outcome[0].training and not uninterrupted[1].training


def test_a_run_leaves_weights_that_can_be_loaded(pv, uninterrupted):
    cfg, vae, _ = uninterrupted
    loaded, info = pv.load_checkpoint(cfg.checkpoint_dir / "runs" / cfg.run_name / "pegasus_vae.safetensors")
    images = pv.load_images(cfg, "test")[:4]
    assert torch.allclose(pv.encode_mean(loaded, images), pv.encode_mean(vae, images), atol=0.01)
    assert info["recipe"]["epochs"] == cfg.epochs and info["recipe"]["images"] == 100


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(pv, cfg, assert_same):
    assert_same(pv.fit(cfg))
    with pytest.raises(AssertionError):
        assert_same(pv.fit(cfg.model_copy(update={"seed": 1, "run_name": "other"})))


def test_a_run_that_crashed_between_epochs_ends_as_if_it_had_not(pv, cfg, assert_same):
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    seen = []
    assert_same(pv.fit(cfg, on_epoch=lambda vae, history: seen.append(len(history))))
    assert seen == [2]  # the first epoch was not trained again


@pytest.mark.parametrize("step", [1, 3, 8])
def test_a_run_that_crashed_inside_an_epoch_ends_as_if_it_had_not(pv, cfg, assert_same, at_step, step):
    at_step(step, crash)
    with pytest.raises(Crash):
        pv.fit(cfg)
    assert_same(pv.fit(cfg))


def stop_after_the_weights_changed(at_step, monkeypatch):
    original, count = torch.optim.Adam.step, iter(range(1, 10**6))

    def step(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        if next(count) == 8:
            press_stop()

    monkeypatch.setattr(torch.optim.Adam, "step", step)


def stop_while_evaluating(at_step, monkeypatch):
    pegasus_vae = sys.modules["pegasus_vae"]
    original, count = pegasus_vae.evaluate, iter(range(1, 10**6))

    def evaluate(*arguments):
        values = original(*arguments)
        if next(count) == 1:
            press_stop()
        return values

    monkeypatch.setattr(pegasus_vae, "evaluate", evaluate)


STOPS = {
    "in the first step": lambda at_step, monkeypatch: at_step(1, press_stop),
    "before the weights of a step change": lambda at_step, monkeypatch: at_step(8, press_stop),
    "just after they changed": stop_after_the_weights_changed,
    "while held-out images are evaluated": stop_while_evaluating,
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_the_stop_button_saves_and_returns_and_the_run_goes_on_exactly(
    pv, cfg, run, capsys, at_step, assert_same, monkeypatch, stop
):
    stop(at_step, monkeypatch)
    vae, history = pv.fit(cfg)
    assert len(history) < 2 and not vae.training
    assert "stopped" in capsys.readouterr().out and (run / "state.pt").exists()
    assert_same(pv.fit(cfg))


def test_the_stop_button_works_again_after_training(pv, cfg):
    before = signal.getsignal(signal.SIGINT)
    pv.fit(cfg)
    assert signal.getsignal(signal.SIGINT) is before


def train_and_die(settings, number, said):
    """Train, saving after every step, and die by SIGKILL at the event of that number; put what it was into said.

    Events: a loss is computed; half a file of state is written; a file is flushed; a file is about to be renamed."""
    import pegasus_vae as pv

    events, minutes = itertools.count(1), itertools.count()
    compute, fsync, replace = pv.vae_loss, os.fsync, os.replace

    def event(text):
        if next(events) == number:
            said.send(text)
            os.kill(os.getpid(), signal.SIGKILL)

    class WrittenInHalves(io.FileIO):
        def write(self, content):
            half = super().write(content[: len(content) // 2])
            event(f"with half of {Path(self.name).name} written")
            return half + super().write(content[half:])

    def replace_or_die(source, target):
        event(f"before {Path(source).name} became {Path(target).name}")
        replace(source, target)

    pv.vae_loss = lambda *arguments: event("inside a step") or compute(*arguments)
    pv.open = lambda path, mode="r", **how: (WrittenInHalves if mode == "wb" else open)(path, mode, **how)
    pv.os.replace = replace_or_die
    pv.os.fsync = lambda file: fsync(file) or event("after a flush")
    pv.time.monotonic = lambda: 61.0 * next(minutes)
    pv.tqdm.set_lock(threading.RLock())  # one that leaves nothing behind
    pv.fit(pv.Config(**settings))
    said.send("not killed")


def test_a_run_killed_at_eight_random_moments_ends_bit_for_bit_like_one_that_was_not(pv, cfg, run):
    cfg = cfg.model_copy(update={"epochs": 4})
    expected, history = pv.fit(cfg.model_copy(update={"run_name": "undisturbed"}))
    processes, rng, log = multiprocessing.get_context("forkserver"), random.Random(0), []
    processes.set_forkserver_preload(["pegasus_vae"])  # imported once; each process starts from there
    while len(log) < 8:
        told, said = processes.Pipe(duplex=False)
        number = rng.randint(1, 16)
        killed = processes.Process(target=train_and_die, args=(json.loads(cfg.model_dump_json()), number, said))
        killed.start()
        assert told.poll(300), "neither killed nor finished"
        log.append(told.recv())
        killed.join(300)
        assert killed.exitcode == -signal.SIGKILL, log
    assert len(set(log)) >= 4, "the kills must fall on different kinds of moment"
    vae, resumed = pv.fit(cfg)
    different = [n for n, t in vae.state_dict().items() if not torch.equal(t, expected.state_dict()[n])]
    assert different == [] and timeless(resumed) == timeless(history)


# What each process of a team runs: train the second of three epochs, report what was done, and die.
MEMBER = """
import json, os, sys
import pegasus_vae as pv

_, settings, outcome = sys.argv
seen, written, loss, write = [], [], pv.vae_loss, pv.write_atomically
pv.vae_loss = lambda *arguments: seen.append(arguments[1]) or loss(*arguments)
pv.write_atomically = lambda path, *more: written.append(path) or write(path, *more)


def report_and_die(vae, history):
    report = {"history": history, "weights": list(vae.parameters()), "seen": pv.torch.cat(seen)}
    pv.torch.save(report | {"written": len(written)}, f"{outcome}{pv.RANK}.pt")
    pv.dist.barrier()
    os._exit(3)


cfg = pv.Config(**json.loads(settings))
pv.join_team(cfg, pv.torch.device("cpu"))
pv.fit(cfg, on_epoch=report_and_die)
"""


@pytest.fixture
def team(tmp_path):
    """team(count, script, ...): run a script by torchrun, in that many processes."""

    def team(count, *arguments):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        command = [*torchrun, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    return team


def assert_close(history, expected):
    """Batch norm over half a batch changes the losses by less than 3 % in this tiny run, and the order of images not."""
    assert [record["epoch"] for record in history] == [record["epoch"] for record in expected]
    assert [record["bce"] for record in history] == pytest.approx([record["bce"] for record in expected], rel=0.03)
    assert [record["kl"] for record in history] == pytest.approx([record["kl"] for record in expected], rel=0.3)


def test_two_processes_go_on_where_one_stopped_share_its_batches_and_one_goes_on_after_them(
    pv, cfg, run, team, tmp_path
):
    cfg = cfg.model_copy(update={"epochs": 3})
    _, expected = pv.fit(cfg.model_copy(update={"run_name": "undisturbed"}))
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    member = tmp_path / "member.py"
    member.write_text(MEMBER)
    died = team(2, member, cfg.model_dump_json(), tmp_path / "outcome")
    assert died.returncode != 0
    first, second = (torch.load(tmp_path / f"outcome{rank}.pt", weights_only=False) for rank in range(2))
    assert timeless(first["history"])[:1] == timeless(expected)[:1]
    assert_close(first["history"], expected[:2])
    assert all(torch.equal(*pair) for pair in zip(first["weights"], second["weights"]))
    everything = pv.load_images(cfg, "train+unlabeled")
    seen = (torch.cat([first["seen"], second["seen"]]) * 255).round().byte()
    assert sorted(image.tolist() for image in seen) == sorted(image.tolist() for image in everything)
    assert first["written"] > 0 == second["written"]
    _, history = pv.fit(cfg)
    assert timeless(history)[:2] == timeless(first["history"])
    assert_close(history, expected)


def test_the_notebook_trains_under_torchrun_and_goes_on_alone(cfg, run, uninterrupted, team, tmp_path):
    script = Path(__file__).parents[1] / "pegasus_vae.py"
    until_trained, _ = script.read_text().split("# %% [markdown]\n# ## What it learned")
    (tmp_path / "part.py").write_text(until_trained + "\nprint('goes on:', RANK, ranks())\n")
    flags = []
    for field in ("output_dir", "checkpoint_dir", "image_size", "kl_weight"):
        flags += [f"--{field.replace('_', '-')}", getattr(cfg, field)]
    done = team(2, tmp_path / "part.py", "--mode", "paper", *flags)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "goes on" in line] == ["goes on: 0 1"]
    assert done.stdout.count("mode paper, seed 0") == 1  # one process speaks
    assert (run / "pegasus_vae.safetensors").exists()
    with open(run / "history.csv") as file:
        assert_close([{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)], uninterrupted[2])


def test_a_stopped_training_ends_the_story_with_what_to_do(pv, cfg):
    pv.check_finished(cfg, [{}, {}])
    with pytest.raises(pv.ReaderError, match="stopped after 1 of 2 epochs: run this cell again to go on"):
        pv.check_finished(cfg, [{}])
    script = (Path(__file__).parents[1] / "pegasus_vae.py").read_text()
    assert script.count("        check_finished(cfg, ") == 3, "after each of the three trainings"


@pytest.mark.parametrize("processes", [3, 20])
def test_a_batch_that_cannot_be_shared_is_refused(pv, cfg, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(pv.ReaderError, match=f"{processes} processes cannot share a batch of 20 evenly, two"):
        pv.join_team(cfg, torch.device("cpu"))


def test_one_process_of_several_leaves_the_stop_button_alone(pv, cfg, monkeypatch):
    before, vae = signal.getsignal(signal.SIGINT), pv.VAE(cfg)
    images, optimizer = pv.load_images(cfg, "test"), torch.optim.Adam(vae.parameters())
    for processes, left_alone in ((1, False), (2, True)):
        monkeypatch.setattr(pv, "ranks", lambda: processes)  # noqa: B023
        with pv.TrainingRun(cfg, vae, optimizer, images, ("bce", "kl")):
            assert (signal.getsignal(signal.SIGINT) is before) is left_alone
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("device, steps, compiled", [("cuda", 2000, True), ("cuda", 1999, False), ("cpu", 2000, False)])
def test_only_a_long_run_on_a_gpu_is_compiled(pv, cfg, monkeypatch, device, steps, compiled):
    asked = []
    monkeypatch.setattr(pv.torch, "compile", lambda function, **how: asked.append(how) or function)
    monkeypatch.setattr(pv, "device_of", lambda model: torch.device(device))
    with torch._dynamo.config.patch(suppress_errors=False):  # set back afterwards
        pv.loss_function(cfg, pv.VAE(cfg), steps)
    assert asked == [{"mode": "reduce-overhead"}] * compiled


def test_a_learning_step_moves_each_weight_against_its_derivative_and_clears_it(pv, cfg):
    vae, x = pv.VAE(cfg), torch.rand(4, 3, cfg.image_size, cfg.image_size)
    before = [w.detach().clone() for w in vae.parameters()]
    torch.manual_seed(1)
    gradients = torch.autograd.grad(pv.batch_loss(vae, x, cfg).total, list(vae.parameters()))
    optimizer, loss_of = torch.optim.SGD(vae.parameters(), lr=0.1), pv.loss_function(cfg, vae, 1)
    torch.manual_seed(1)
    loss = pv.learning_step(loss_of, optimizer, x)
    for weight, old, gradient in zip(vae.parameters(), before, gradients):
        assert torch.allclose(weight, old - 0.1 * gradient, atol=1e-6)
        assert weight.grad is None or not weight.grad.any()
    torch.manual_seed(1)
    assert pv.learning_step(loss_of, optimizer, x).total < loss.total


@pytest.mark.parametrize("kl_weight, reduction", [(0.3, "mean"), (0.01, "sum")])
def test_the_loss_of_a_batch_is_that_of_a_draw_with_the_settings_weight_and_reduction(pv, cfg, kl_weight, reduction):
    cfg = cfg.model_copy(update={"kl_weight": kl_weight, "reduction": reduction})
    vae, x = pv.VAE(cfg), torch.rand(4, 3, cfg.image_size, cfg.image_size)
    torch.manual_seed(1)
    logits, mu, logvar = vae(x)
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv, "mixed_precision", lambda device: nullcontext())
        assert torch.allclose(
            torch.stack(pv.batch_loss(vae, x, cfg)),
            torch.stack(pv.vae_loss(logits, x, mu, logvar, kl_weight, reduction)),
        )


def test_another_recipe_is_refused_with_each_difference_named_and_the_state_is_kept(pv, cfg, run):
    pv.fit(cfg.model_copy(update={"epochs": 1}))
    before = (run / "state.pt").read_bytes()
    with pytest.raises(pv.ReaderError) as refusal:
        pv.fit(cfg.model_copy(update={"epochs": 1, "lr": 0.001, "latent_dim": 8, "max_images": 40}))
    message = str(refusal.value)
    assert re.search(r"lr was 0.0004\D+0.001\b", message) and re.search(r"latent_dim was 16\D+8\b", message)
    assert re.search(r"images was 100\D+40\b", message) and "epochs" not in message and "run_name" in message
    assert (run / "state.pt").read_bytes() == before


def test_settings_that_do_not_decide_the_result_may_change(pv, cfg, assert_same):
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    assert_same(pv.fit(cfg.model_copy(update={"horse_weight": 0.5, "picks_per_class": 4, "mode": "paper"})))


class Trap:
    """Unpickling this runs code."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: os.truncate(file, 0),
    "foreign": lambda file: file.write_bytes(b"not a training state" * 100),
    "of something else": lambda file: torch.save({"weights": torch.zeros(3)}, file),
    "a list": lambda file: torch.save([1, 2], file),
    "a trap": lambda file: torch.save(Trap(file.with_name("sprung")), file),
}


@pytest.fixture
def begun(pv, cfg, run):
    """The folder of a run that stopped after its first epoch."""
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_is_refused_by_name_never_executed_and_not_overwritten(pv, cfg, begun, damage):
    damage(begun / "state.pt")
    before = contents(begun)
    with pytest.raises(pv.ReaderError, match=f"{begun}/state.pt cannot be used .*delete {begun} to start again"):
        pv.fit(cfg)
    assert contents(begun) == before and not (begun / "sprung").exists()


def test_what_a_refusal_tells_to_do_helps(pv, cfg, begun, assert_same):
    DAMAGE["truncated"](begun / "state.pt")
    with pytest.raises(pv.ReaderError):
        pv.fit(cfg)
    shutil.rmtree(begun)
    assert_same(pv.fit(cfg))


@pytest.mark.parametrize(
    "error, reason", [(OSError(errno.EIO, "I/O error"), "I/O error"), (MemoryError(), "MemoryError")]
)
def test_a_state_that_cannot_be_read_now_is_kept(pv, cfg, begun, assert_same, error, reason):
    before = contents(begun)

    def fail(*_, **__):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv.torch, "load", fail)
        with pytest.raises(pv.ReaderError, match=f"state.pt cannot be used .{reason}"):
            pv.fit(cfg)
    assert contents(begun) == before
    assert_same(pv.fit(cfg))


def test_a_figure_that_cannot_be_written_does_not_end_the_run(pv, cfg, uninterrupted, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pv, "show_rows", fail)
    pv.watch(cfg, *uninterrupted[1:])
    assert "NOT drawn, training goes on" in capsys.readouterr().err


def test_the_reconstructions_are_drawn_before_the_training_and_redrawn_in_place_after_every_epoch(
    pv, cfg, uninterrupted, monkeypatch
):
    shown = []
    monkeypatch.setattr(pv, "show_rows", lambda path, rows, title, _, **how: shown.append((path.name, title, how)))
    for count in range(3):
        pv.watch(cfg, uninterrupted[1], [{}] * count)
    updates = [{"update": False}, {"update": True}, {"update": True}]
    assert shown == [("training.png", f"After epoch {count}", how) for count, how in enumerate(updates)]


@pytest.mark.parametrize("name", ["state.pt", "history.csv", "pegasus_vae.safetensors"])
def test_a_crash_just_before_a_file_takes_its_place_changes_nothing(pv, cfg, assert_same, name):
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace
        patch.setattr(pv.os, "replace", lambda a, b: crash() if Path(b).name == name else replace(a, b))
        with pytest.raises(Crash):
            pv.fit(cfg)
    assert_same(pv.fit(cfg))


def test_weights_that_could_not_be_written_are_written_by_the_next_start(pv, cfg, run, assert_same):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv, "save_checkpoint", fail)
        with pytest.raises(OSError, match="No space left"):
            pv.fit(cfg)
    assert_same(pv.fit(cfg))
    assert (run / "pegasus_vae.safetensors").exists()


def test_a_full_disk_does_not_end_the_run_but_is_reported(pv, cfg, assert_same, capsys):
    with pytest.MonkeyPatch.context() as patch:
        original, count = os.fsync, iter(range(1, 100))

        def fsync(file):
            if next(count) == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(file)

        pv.load_images(cfg, "train+unlabeled")
        pv.load_images(cfg, "test")
        patch.setattr(pv.os, "fsync", fsync)
        assert_same(pv.fit(cfg))
    said = capsys.readouterr()
    assert "No space left on device" in said.out + said.err


# On a disk of its own, too small for two states: train, make room, train again. Then on one that takes no files.
DISKS = """
import json, subprocess, sys
import pegasus_vae as pv

cfg = pv.Config(**json.loads(sys.argv[1]))
cfg.checkpoint_dir.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={sys.argv[2]}", "tmpfs", cfg.checkpoint_dir], check=True)
pv.fit(cfg)
run = cfg.checkpoint_dir / "runs" / cfg.run_name
print(*sorted(file.name for file in run.iterdir()), "epoch", pv.torch.load(run / "state.pt")["epoch"])
subprocess.run(["mount", "-o", "remount,size=64m", cfg.checkpoint_dir], check=True)
vae, history = pv.fit(cfg)
pv.torch.save((vae.state_dict(), history), sys.argv[3])
subprocess.run(["mount", "-o", "remount,ro", cfg.checkpoint_dir], check=True)
for attempt in (lambda: pv.check_writable(cfg.checkpoint_dir, "PEGASUS_OUTPUT_DIR"), lambda: pv.fit(cfg)):
    try:
        attempt()
    except pv.ReaderError as error:
        print("refused:", error)
"""


@pytest.fixture(scope="module")
def disks(uninterrupted, tmp_path_factory):
    """What DISKS says, with settings like the uninterrupted run's, and the file of the outcome."""
    if subprocess.run("unshare -rm mount -t tmpfs tmpfs /mnt", shell=True, capture_output=True).returncode:
        pytest.skip("this system lets no process mount file systems of its own (unshare -rm)")
    folder, (cfg, _, _) = tmp_path_factory.mktemp("disks"), uninterrupted
    state = (cfg.checkpoint_dir / "runs" / cfg.run_name / "state.pt").stat().st_size
    cfg = cfg.model_copy(update={"output_dir": folder / "outputs", "checkpoint_dir": folder / "checkpoints"})
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [cfg.model_dump_json(), str(int(state * 1.5)), str(folder / "outcome.pt")]
    command = ["unshare", "-rm", sys.executable, "-c", DISKS, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_a_disk_that_is_really_full_costs_nothing_but_the_saving(disks, uninterrupted):
    done, folder = disks
    assert re.search("NOT saved, training goes on: .*state.pt: .*No space left on device", done.stderr), done.stderr
    assert "history.csv lock pegasus_vae.safetensors state.pt epoch 1\n" in done.stdout  # no half-written file is left
    weights, history = torch.load(folder / "outcome.pt")
    assert all(torch.equal(t, weights[name]) for name, t in uninterrupted[1].state_dict().items())
    assert timeless(history) == timeless(uninterrupted[2])


def test_a_read_only_folder_is_refused_by_name_with_its_setting(disks):
    refused = [line for line in disks[0].stdout.splitlines() if line.startswith("refused")]
    for line, setting in zip(refused, ("OUTPUT_DIR", "CHECKPOINT_DIR"), strict=True):
        assert line.startswith(f"refused: cannot write to {disks[1]}/checkpoints")
        assert line.endswith(f"Read-only file system): mend that, or name another folder with PEGASUS_{setting}")


def spoil_loss(loss):
    return loss._replace(total=loss.total * math.nan, bce=loss.bce * math.nan)


def spoil_gradient(loss):
    loss.total.register_hook(lambda gradient: gradient * math.nan)


@pytest.mark.parametrize(
    "step, spoil", [(8, spoil_loss), (10, spoil_loss), (10, spoil_gradient)], ids=["loss", "last loss", "last gradient"]
)
def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_state_survives(
    pv, cfg, run, at_step, assert_same, step, spoil
):
    saved = []
    at_step(step, spoil)
    with pytest.raises(pv.ReaderError, match="not finite"):
        pv.fit(cfg, on_epoch=lambda *_: saved.append((run / "state.pt").read_bytes()))
    assert saved == [(run / "state.pt").read_bytes()]
    assert_same(pv.fit(cfg))


def test_a_run_that_is_stopped_when_its_loss_is_not_finite_keeps_the_last_good_state(pv, cfg, begun, at_step):
    before = contents(begun)["state.pt"]
    at_step(2, lambda loss: press_stop() or spoil_loss(loss))
    with pytest.raises(pv.ReaderError, match="not finite"):
        pv.fit(cfg)
    assert contents(begun)["state.pt"] == before


def test_a_second_process_is_kept_out_of_a_run_and_the_first_is_not_disturbed(pv, cfg, run, assert_same):
    refused = []

    def start_another(vae, history):
        with pytest.raises(pv.ReaderError, match=f"another process is training in {run}"):
            pv.fit(cfg)
        refused.append(True)

    assert_same(pv.fit(cfg, on_epoch=start_another))
    assert refused == [True, True]


def test_fewer_images_than_a_batch_are_refused(pv, cfg):
    with pytest.raises(pv.ReaderError, match="100 training images .* 200"):
        pv.fit(cfg.model_copy(update={"batch_size": 200}))


def test_max_images_takes_that_many_evenly_spread(pv, cfg, monkeypatch):
    shown, original = [], pv.vae_loss
    monkeypatch.setattr(pv, "vae_loss", lambda *arguments: shown.append(arguments[1]) or original(*arguments))
    pv.fit(cfg.model_copy(update={"max_images": 40, "epochs": 1}))
    everything = pv.load_images(cfg, "train+unlabeled")
    chosen = everything[torch.linspace(0, 99, 40).round().long()]
    seen = (torch.cat(shown) * 255).round().byte()
    assert sorted(image.tolist() for image in seen) == sorted(image.tolist() for image in chosen)


def test_each_epoch_shows_every_image_once_in_an_order_of_its_own(pv, cfg, monkeypatch):
    shown, original = [], pv.vae_loss
    monkeypatch.setattr(pv, "vae_loss", lambda *arguments: shown.append(arguments[1]) or original(*arguments))
    pv.fit(cfg)
    first, second = torch.cat(shown).split(100)
    assert not torch.equal(first, second)
    assert sorted(image.tolist() for image in first) == sorted(image.tolist() for image in second)


def test_evenly_spread_images_include_the_first_and_the_last(pv):
    images = torch.arange(10)
    assert pv.evenly_spread(images, 4).tolist() == [0, 3, 6, 9]
    assert pv.evenly_spread(images, 10).tolist() == pv.evenly_spread(images, 99).tolist() == list(range(10))


@pytest.fixture
def checkpoint(pv, cfg, tmp_path):
    """A small model, and the file that it was saved in."""
    torch.manual_seed(0)
    vae = pv.VAE(cfg)
    vae(torch.rand(4, 3, 32, 32))
    info = {"recipe": json.loads(cfg.model_dump_json()), "data": "drawn", "note": "ä"}
    pv.save_checkpoint(tmp_path / "new" / "vae.safetensors", vae, info)
    return tmp_path / "new" / "vae.safetensors", vae, info


def test_saved_weights_come_back_in_half_precision_in_evaluation_mode_with_their_description(pv, checkpoint):
    path, vae, info = checkpoint
    loaded, described = pv.load_checkpoint(path)
    assert described == info and not loaded.training
    state = loaded.state_dict()
    for name, tensor in vae.state_dict().items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(state[name], expected) and state[name].dtype == tensor.dtype
    assert pv.weights_digest(loaded) == pv.weights_digest(vae)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_digest_tells_weights_apart(pv, checkpoint):
    _, vae, _ = checkpoint
    before = pv.weights_digest(vae)
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert pv.weights_digest(vae) != before


def relabel(**metadata):
    return lambda file: save_file({"x": torch.zeros(3)}, file, metadata)


UNUSABLE = {
    "missing": Path.unlink,
    "empty": lambda file: os.truncate(file, 0),
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1000),
    "a web page": lambda file: file.write_text("<html>404</html>"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "somebody else's": lambda file: save_file({"x": torch.zeros(3)}, file),
    "badly described": relabel(pegasus_vae="not JSON"),
    "without a recipe": relabel(pegasus_vae="{}"),
    "with other weights": relabel(pegasus_vae=json.dumps({"recipe": SETTINGS | {"base_channels": 8, "latent_dim": 8}})),
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_without_usable_weights_is_refused_by_name(pv, checkpoint, spoil):
    path = checkpoint[0]
    spoil(path)
    with pytest.raises(pv.ReaderError, match=str(path)):
        pv.load_checkpoint(path)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(pv, tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    pv.write_atomically(path, b"old")
    with pytest.MonkeyPatch.context() as patch:

        def fsync(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(pv.os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            pv.write_atomically(path, b"new, but")
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    pv.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
