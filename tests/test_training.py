"""Training that can be stopped anywhere and resumed exactly, and files that are whole or refused."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
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


# Trains with a clock that makes every step last longer than a minute, so that each is saved, and kills itself.
KILLED = """
import itertools, json, os, signal, sys
import pegasus_vae as pv

cfg = pv.Config(**json.loads(sys.argv[1]))
minutes, losses = itertools.count(), itertools.count(1)
pv.time.monotonic = lambda: 61.0 * next(minutes)
compute = pv.vae_loss

def vae_loss(*arguments):
    if next(losses) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(*arguments)

pv.vae_loss = vae_loss
pv.fit(cfg)
"""


def test_a_run_killed_inside_an_epoch_goes_on_where_it_was_saved_and_ends_bit_for_bit_the_same(
    pv, cfg, run, tmp_path, assert_same, monkeypatch
):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [sys.executable, "-c", KILLED, cfg.model_dump_json()]
    killed = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps, original = [], pv.vae_loss
    monkeypatch.setattr(pv, "vae_loss", lambda *arguments: steps.append(1) or original(*arguments))
    assert_same(pv.fit(cfg))
    assert len(steps) == 3  # seven of the ten were saved


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


def test_a_good_state_before_is_not_given_up_for_a_damaged_one(pv, cfg, run, assert_same):
    pv.fit(cfg)
    DAMAGE["truncated"](run / "state.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv.os, "fsync", crash)  # the power fails while the next state is written
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


def test_a_file_is_replaced_as_a_whole_or_not_at_all(pv, tmp_path):
    path = tmp_path / "new" / "file"
    pv.write_atomically(path, lambda file: file.write(b"old"))

    def write_half(file):
        file.write(b"new, but")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pv.write_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    pv.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
