"""Training that can be stopped anywhere and resumed exactly, and files that are whole or refused."""

import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SETTINGS = {"image_size": 32, "kl_weight": 0.1}  # ten steps in two epochs, less than half a second
TIMES = ("seconds", "images_per_second")


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


def timeless(history):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in history]


class Crash(Exception):
    """What stops a run that nobody stopped."""


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


def press_stop(*_):
    """What the stop button does."""
    signal.raise_signal(signal.SIGINT)


def crash(*_):
    raise Crash


def test_the_learning_rate_falls_linearly_from_its_first_value_towards_zero(pv):
    cfg = pv.Config(lr=4e-4, epochs=100)
    assert pv.learning_rate(cfg, 0) == 4e-4
    assert pv.learning_rate(cfg, 50) == pytest.approx(2e-4)
    assert pv.learning_rate(cfg, 99) == pytest.approx(4e-6)


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


def test_a_run_killed_at_ten_random_moments_ends_bit_for_bit_like_one_that_was_not(pv, cfg, run):
    cfg = cfg.model_copy(update={"epochs": 4})
    expected, history = pv.fit(cfg.model_copy(update={"run_name": "undisturbed"}))
    processes, rng, log = multiprocessing.get_context("forkserver"), random.Random(0), []
    processes.set_forkserver_preload(["pegasus_vae"])  # imported once; each process starts from there
    while len(log) < 10:
        told, said = processes.Pipe(duplex=False)
        number = rng.randint(1, 16)
        killed = processes.Process(target=train_and_die, args=(json.loads(cfg.model_dump_json()), number, said))
        killed.start()
        assert told.poll(120), "neither killed nor finished"
        log.append(told.recv())
        killed.join(120)
        assert killed.exitcode == -signal.SIGKILL, log
        states = [torch.load(path) for path in (run / "state.pt", run / "state.pt.previous") if path.exists()]
        positions = [f"epoch {state['epoch'] + 1} step {state['step']}" for state in states]
        print(f"kill {len(log):2}: {log[-1]:46} left: {' and '.join(positions) or 'nothing yet'}")
    assert len(set(log)) >= 4, "the kills must fall on different kinds of moment"
    vae, resumed = pv.fit(cfg)
    different = [n for n, t in vae.state_dict().items() if not torch.equal(t, expected.state_dict()[n])]
    assert different == [] and timeless(resumed) == timeless(history)


# What each process of a team runs: train, and crash after the first epoch if told to.
MEMBER = """
import json, os, sys
import pegasus_vae as pv

_, settings, crash, outcome = sys.argv
seen, written, loss, write = [], [], pv.vae_loss, pv.write_atomically
pv.vae_loss = lambda *arguments: seen.append(arguments[1]) or loss(*arguments)
pv.write_atomically = lambda path, *more, **options: written.append(path) or write(path, *more, **options)
vae, history = pv.fit(pv.Config(**json.loads(settings)), on_epoch=lambda *_: os._exit(3) if crash == "crash" else None)
report = {"history": history, "weights": list(vae.parameters()), "seen": pv.torch.cat(seen), "written": len(written)}
pv.torch.save(report, f"{outcome}{pv.RANK}.pt")
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


def test_two_processes_train_like_one_and_one_takes_up_what_two_began(pv, cfg, run, uninterrupted, team, tmp_path):
    member = tmp_path / "member.py"
    member.write_text(MEMBER)
    stopped = team(2, member, cfg.model_dump_json(), "crash", tmp_path / "outcome")
    assert stopped.returncode != 0 and not list(tmp_path.glob("outcome*"))
    begun = pv.read_history(run / "history.csv")
    assert_close(begun, uninterrupted[2][:1])
    _, history = pv.fit(cfg)  # one process goes on
    assert timeless(history)[:1] == timeless(begun)
    assert_close(history, uninterrupted[2])


def test_the_notebook_runs_under_torchrun_and_takes_up_what_one_process_began(pv, cfg, run, uninterrupted, team):
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    begun = pv.read_history(run / "history.csv")
    flags = []
    for field in ("output_dir", "checkpoint_dir", "image_size", "kl_weight"):
        flags += [f"--{field.replace('_', '-')}", getattr(cfg, field)]
    done = team(2, Path(__file__).parents[1] / "pegasus_vae.py", "--mode", "paper", *flags)
    assert done.returncode == 0, done.stderr
    history = pv.read_history(run / "history.csv")
    assert timeless(history)[:1] == timeless(begun)
    assert_close(history, uninterrupted[2])
    assert done.stdout.count("\nmode paper") + done.stdout.startswith("mode paper") == 1  # one process speaks
    assert done.stdout.count("pegasus.png") == 1 and (run / "pegasus_vae.safetensors").exists()


def test_two_processes_share_each_batch_and_take_up_a_state_whose_last_save_was_torn(
    pv, cfg, run, uninterrupted, team, tmp_path
):
    member = tmp_path / "member.py"
    member.write_text(MEMBER)
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=lambda vae, history: crash() if len(history) == 2 else None)
    DAMAGE["truncated"](run / "state.pt")
    done = team(2, member, cfg.model_dump_json(), "", tmp_path / "outcome")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"outcome{rank}.pt", weights_only=False) for rank in range(2))
    assert_close(first["history"], uninterrupted[2])
    assert all(torch.equal(*pair) for pair in zip(first["weights"], second["weights"]))
    everything = pv.load_images(cfg, "train+unlabeled")
    seen = (torch.cat([first["seen"], second["seen"]]) * 255).round().byte()
    assert sorted(image.tolist() for image in seen) == sorted(image.tolist() for image in everything)
    assert first["written"] > 0 == second["written"]


@pytest.mark.parametrize("processes", [3, 20])
def test_a_batch_that_cannot_be_shared_is_refused(pv, cfg, monkeypatch, processes):
    monkeypatch.setattr(pv, "RANKS", processes)
    with pytest.raises(pv.ReaderError, match=f"{processes} processes cannot share a batch of 20 evenly, two"):
        pv.fit(cfg)


def test_images_that_do_not_fit_on_the_device_stay_where_they_are(pv):
    class TooLarge:
        def to(self, device):
            raise torch.OutOfMemoryError

    images = TooLarge()
    assert pv.keep_near(images, "cuda") is images


def test_compiling_is_tried_before_it_is_relied_on(pv, monkeypatch):
    monkeypatch.setattr(pv.torch, "compile", crash)
    assert not pv.compiles(torch.device("cpu"))


@pytest.mark.parametrize("steps, compiled", [(1999, False), (2000, True)])
def test_a_long_run_on_a_gpu_is_compiled_and_a_short_one_is_not(pv, cfg, monkeypatch, steps, compiled):
    asked = []
    monkeypatch.setattr(pv.torch, "compile", lambda function, **how: asked.append(how) or function)
    monkeypatch.setattr(pv, "compiles", lambda device: True)
    vae = pv.VAE(cfg)
    pv.loss_function(cfg, vae, torch.device("cuda"), steps)
    pv.loss_function(cfg, vae, torch.device("cpu"), steps)
    assert asked == [{"mode": "reduce-overhead"}] * compiled


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


@pytest.mark.parametrize("damage", [*DAMAGE.values(), Path.unlink], ids=[*DAMAGE, "missing"])
def test_a_damaged_state_falls_back_to_the_one_before_and_ends_the_same(pv, cfg, run, assert_same, damage):
    pv.fit(cfg)
    damage(run / "state.pt")
    assert_same(pv.fit(cfg))
    assert not (run / "sprung").exists()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_two_damaged_states_are_refused_by_name_and_never_executed(pv, cfg, run, damage):
    pv.fit(cfg)
    for name in ("state.pt", "state.pt.previous"):
        damage(run / name)
    with pytest.raises(pv.ReaderError, match=f"{run}/state.pt .*{run}/state.pt.previous"):
        pv.fit(cfg)
    assert not (run / "sprung").exists()


@pytest.mark.parametrize("error", [PermissionError("no permission"), MemoryError("no room")])
def test_a_state_that_cannot_be_read_now_is_no_damaged_one_and_is_kept(pv, cfg, run, assert_same, error, monkeypatch):
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=crash)
    before = {path: path.read_bytes() for path in run.iterdir()}

    def fail(*_, **__):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv.torch, "load", fail)
        with pytest.raises(pv.ReaderError, match=f"state.pt cannot be read now .{error}.: mend that"):
            pv.fit(cfg)
    assert {path: path.read_bytes() for path in run.iterdir()} == before
    assert_same(pv.fit(cfg))


def test_the_reader_is_told_that_the_state_before_is_used(pv, cfg, run, capsys):
    pv.fit(cfg)
    DAMAGE["truncated"](run / "state.pt")
    pv.fit(cfg)
    assert f"{run / 'state.pt'} cannot be read: going on from {run / 'state.pt.previous'}" in capsys.readouterr().err


def test_a_figure_that_cannot_be_written_does_not_end_the_run(pv, cfg, uninterrupted, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pv, "cfg", cfg, raising=False)
    monkeypatch.setattr(pv, "show_rows", fail)
    pv.watch(*uninterrupted[1:])
    assert "NOT drawn, training goes on" in capsys.readouterr().err


def test_a_good_state_before_is_not_given_up_for_a_damaged_one(pv, cfg, run, assert_same):
    with pytest.raises(Crash):
        pv.fit(cfg, on_epoch=lambda vae, history: crash() if len(history) == 2 else None)
    DAMAGE["truncated"](run / "state.pt")
    with pytest.MonkeyPatch.context() as patch:
        replace = os.replace

        def fail(source, target):  # the power fails when the next state is about to take its place
            return crash() if Path(target).name == "state.pt" else replace(source, target)

        patch.setattr(pv.os, "replace", fail)
        with pytest.raises(Crash):
            pv.fit(cfg)
    assert_same(pv.fit(cfg))


@pytest.mark.parametrize("call", range(1, 6))
def test_a_crash_while_saving_costs_no_more_than_an_epoch(pv, cfg, assert_same, call):
    with pytest.MonkeyPatch.context() as patch:
        original, count = os.replace, iter(range(1, 100))
        patch.setattr(pv.os, "replace", lambda *names: crash() if next(count) == call else original(*names))
        with pytest.raises(Crash):
            pv.fit(cfg)
    assert_same(pv.fit(cfg))


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


# On a disk of its own, too small for two states: train, make room, train again.
FULL = """
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
"""


@pytest.fixture
def with_mounts(tmp_path):
    """with_mounts(script, ...): run a Python script in a process that may mount file systems of its own."""
    if subprocess.run("unshare -rm mount -t tmpfs tmpfs /mnt", shell=True, capture_output=True).returncode:
        pytest.skip("this system lets no process mount file systems of its own (unshare -rm)")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}

    def with_mounts(script, *arguments):
        command = ["unshare", "-rm", sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return with_mounts


def test_a_disk_that_is_really_full_costs_nothing_but_the_saving(pv, cfg, uninterrupted, with_mounts, tmp_path):
    state = (uninterrupted[0].checkpoint_dir / "runs" / cfg.run_name / "state.pt").stat().st_size
    done = with_mounts(FULL, cfg.model_dump_json(), int(state * 1.5), tmp_path / "outcome.pt")
    assert done.returncode == 0, done.stderr
    assert re.search("NOT saved, training goes on: .*state.pt: .*No space left on device", done.stderr), done.stderr
    assert "history.csv lock pegasus_vae.safetensors state.pt epoch 1\n" in done.stdout  # no half-written file is left
    weights, history = torch.load(tmp_path / "outcome.pt")
    assert all(torch.equal(t, weights[name]) for name, t in uninterrupted[1].state_dict().items())
    assert timeless(history) == timeless(uninterrupted[2])


READ_ONLY = """
import runpy, subprocess, sys

_, folder, *sys.argv = sys.argv
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=True)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("setting", ["output_dir", "checkpoint_dir"])
def test_a_read_only_folder_is_refused_in_one_line_that_names_the_setting(with_mounts, tmp_path, setting):
    folder = tmp_path / "read-only"
    folder.mkdir()
    script = Path(__file__).parents[1] / "pegasus_vae.py"
    flags = ["--mode", "smoke", "--output-dir", tmp_path / "outputs", "--checkpoint-dir", tmp_path / "checkpoints"]
    flag = f"--{setting.replace('_', '-')}"
    done = with_mounts(READ_ONLY, folder, script, *flags, flag, folder)
    assert done.returncode == 1
    reason = "Read-only file system): mend that, or name another folder with PEGASUS_" + setting.upper()
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write to {folder}"), done.stderr
    assert done.stderr.splitlines()[-1].endswith(reason) and "Traceback" not in done.stderr


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


def test_the_first_step_without_a_finite_loss_is_named(pv, cfg, at_step):
    at_step(8, spoil_loss)
    with pytest.raises(pv.ReaderError, match=r"epoch 2, step [23]\b"):  # the third step of the second epoch
        pv.fit(cfg)


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
