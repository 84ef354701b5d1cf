"""The prior over codes: its network, what it learns from, its training, and what is drawn and mended with it."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from conftest import TIMES, Crash, crash, press_stop, timeless

SETTINGS = {"image_size": 32, "latent_dim": 64, "kl_weight": 0.1}  # a grid of (2, 8, 8), ten steps in two epochs
CLASSES = ["bird", "cat", "horse"]


def grid_config(pegasus_vae, folder):
    cfg = pegasus_vae.Config(output_dir=folder / "outputs", checkpoint_dir=folder / "checkpoints", **SETTINGS)
    return pegasus_vae.spatial(cfg)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Settings, the grid VAE, its prior and the prior's history, of runs that nothing disturbed. All are only read."""
    import pegasus_vae

    cfg = grid_config(pegasus_vae, tmp_path_factory.mktemp("trained"))
    pegasus_vae.fit(cfg)
    vae, _ = pegasus_vae.load_checkpoint(cfg.checkpoint_dir / "runs" / cfg.run_name / "pegasus_vae.safetensors")
    return cfg, vae, *pegasus_vae.fit_prior(cfg, vae)


@pytest.fixture
def vae(trained):
    return trained[1]


@pytest.fixture
def cfg(pv, trained, tmp_path):
    """The settings of the trained prior with folders of the test's own, in which the codes are already cached."""
    cfg = grid_config(pv, tmp_path)
    shutil.copytree(trained[0].output_dir / "cache", cfg.output_dir / "cache")
    return cfg


@pytest.fixture
def run(cfg):
    """The folder of the prior's training run."""
    return cfg.checkpoint_dir / "runs" / f"{cfg.run_name}-prior"


@pytest.fixture
def cached(cfg):
    """cached(): the cached codes of the test split, their names."""
    return lambda: sorted(file.name for file in (cfg.output_dir / "cache").glob("codes-test-*.safetensors"))


def differing(prior, expected):
    """The names of the tensors that differ."""
    expected = expected.state_dict()
    return [name for name, tensor in prior.state_dict().items() if not torch.equal(tensor, expected[name])]


@pytest.fixture
def assert_same(trained):
    """assert_same(fit_prior(cfg, vae)): the outcome is the undisturbed run's, to the last bit."""

    def assert_same(outcome):
        prior, history = outcome
        assert differing(prior, trained[2]) == []
        assert timeless(history) == timeless(trained[3])

    return assert_same


def wake(prior):
    """The prior with random weights where an untrained one has zeros, so that everything in it has an effect."""
    with torch.no_grad():
        for weight in prior.parameters():
            if not weight.any():
                weight.normal_(std=0.2)
        prior.mean.normal_()
        prior.deviation.uniform_(0.5, 2)
    return prior


@pytest.fixture
def silent(pv):
    """An untrained prior on a grid of two channels, whose codes are not standardised."""
    torch.manual_seed(0)
    prior = pv.FlowPrior((2, 4, 4), CLASSES, 24, depth=2)
    prior.mean.normal_()
    prior.deviation.uniform_(0.5, 2)
    return prior


@pytest.fixture
def prior(silent):
    """One like it, awake."""
    return wake(silent)


@pytest.fixture
def codes():
    torch.manual_seed(1)
    return torch.randn(5, 32) * 2 + 1


@pytest.fixture
def exact(pv, monkeypatch):
    """Numbers of 32 bits on every machine."""
    monkeypatch.setattr(pv, "mixed_precision", lambda device: nullcontext())


# The network


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("channels", [1, 4])
def test_velocities_have_the_shape_of_codes_and_are_float32(pv, channels, side):
    prior = wake(pv.FlowPrior((channels, side, side), CLASSES, 24, depth=1))
    z_t, t, labels = torch.randn(3, channels * side**2), torch.rand(3), torch.tensor([0, 1, 3])
    velocities = prior(z_t, t, labels)
    assert velocities.shape == z_t.shape and velocities.dtype == torch.float32
    velocities.square().sum().backward()
    assert [name for name, weight in prior.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_an_untrained_network_stands_still_so_its_loss_on_standardised_codes_is_two(pv, silent):
    z = torch.randn(512, 32)
    labels = torch.arange(512) % 4
    assert not silent(z, torch.rand(512), labels).any()
    assert pv.flow_matching_loss(silent, z, labels).item() == pytest.approx(2, rel=0.05)


def test_velocities_depend_on_time_and_class(prior, codes):
    def velocities(t, label):
        return prior(codes, torch.full((5,), t), torch.full((5,), label))

    different = [velocities(t, label) for t in (0.2, 0.3) for label in range(4)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(different, 2))


def test_attention_is_torchs_own(pv):
    block, x = pv.FlowBlock(24), torch.randn(3, 7, 24)
    queries, keys, values = block.to_queries_keys_values(x).chunk(3, dim=2)
    queries, keys, values = (part.unflatten(2, (4, 6)).transpose(1, 2) for part in (queries, keys, values))
    expected = F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    assert torch.allclose(block.attend(x), block.to_output(expected), atol=1e-6)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_velocity_of_a_block_of_cells_is_written_where_the_block_was_read(pv, depth):
    """Without layers only the block's own cells know of it; layers let all others know."""
    prior = wake(pv.FlowPrior((2, 8, 8), CLASSES, 24, depth=depth))
    z, t, labels = torch.randn(1, 2, 8, 8), torch.rand(1), torch.tensor([1])
    other = z.clone()
    other[0, 0, 2, 5] += 1  # row 2 and column 5 are in the block of rows 2 and 3, columns 4 and 5
    moved = (prior(other.flatten(1), t, labels) - prior(z.flatten(1), t, labels)).view(2, 8, 8)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:4, 4:6] = True
    assert moved[:, inside].all()
    assert (moved[:, ~inside] != 0).any() == (depth > 0)


def test_standardise_and_restore_are_inverse(prior, codes):
    assert torch.allclose(prior.restore(prior.standardise(codes)), codes, atol=1e-5)
    first, second = prior.standardise(codes).unflatten(1, (2, 16)).unbind(1)
    assert torch.allclose(first * prior.deviation[0, 0, 0] + prior.mean[0, 0, 0], codes[:, :16], atol=1e-5)
    assert torch.allclose(second * prior.deviation[1, 0, 0] + prior.mean[1, 0, 0], codes[:, 16:], atol=1e-5)


# The loss and the flow


def test_the_field_that_knows_the_code_has_no_loss(pv, silent):
    """On the line z_t = (1 - t) eps + t z the velocity z - eps is (z - z_t) / (1 - t)."""
    z = torch.randn(32).expand(64, 32)
    silent.forward = lambda z_t, t, labels: (z - z_t) / (1 - t[:, None])
    assert pv.flow_matching_loss(silent, z, torch.zeros(64, dtype=torch.long)).item() < 1e-6


def test_the_loss_is_taken_at_all_times_most_of_them_in_the_middle(pv, silent):
    seen = []
    silent.forward = lambda z_t, t, labels: seen.append((t, labels)) or torch.zeros_like(z_t)
    given = torch.arange(20_000) % 4
    pv.flow_matching_loss(silent, torch.zeros(20_000, 32), given)
    (t, labels), *_ = seen
    assert torch.equal(labels, given) and t.shape == (20_000,)
    assert 0 < t.min() < 0.05 and 0.95 < t.max() < 1 and t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert ((t - 0.5).abs() < 0.25).float().mean().item() == pytest.approx(0.728, abs=0.02)  # even times: 0.5


@pytest.mark.parametrize("strength", [0.3, 1])
def test_following_the_field_that_knows_the_code_ends_at_the_code(pv, silent, codes, strength):
    target, times = torch.randn(5, 32), []

    def forward(z_t, t, labels):
        times.append(t[0].item())
        return (target - z_t) / (1 - t[:, None])

    silent.forward = forward
    mended = pv.mend_codes(silent, codes, strength)
    assert torch.allclose(mended, silent.restore(target), atol=1e-3)
    assert times == sorted(times) and times[0] == pytest.approx(1 - strength) and times[-1] < 1


def test_the_flow_begins_on_the_line_from_noise_to_the_code(pv, silent, codes):
    """A prior that stands still draws the noise itself."""
    noise = silent.standardise(pv.draw_codes(silent, 5, seed=3))
    assert noise.mean().abs() < 0.3 and noise.std().item() == pytest.approx(1, abs=0.2)
    mended = silent.standardise(pv.mend_codes(silent, codes, 0.25, seed=3))
    assert torch.allclose(mended, 0.25 * noise + 0.75 * silent.standardise(codes), atol=1e-5)


@pytest.mark.parametrize("steps, strength, evaluations", [(16, 1, 32), (16, 0.5, 16), (10, 0.33, 8), (4, 0.01, 2)])
def test_a_step_takes_two_evaluations_and_weaker_mending_fewer_steps(pv, silent, codes, steps, strength, evaluations):
    seen = []
    silent.forward = lambda z_t, t, labels: seen.append(t) or torch.zeros_like(z_t)
    pv.mend_codes(silent, codes, strength, steps=steps)
    assert len(seen) == evaluations


def test_midpoint_steps_follow_a_curved_field_closely(pv, silent, codes):
    """dz/dt = -3 z from 0 to 1 shrinks z to exp(-3); sixteen Euler steps would be off by a fourth."""
    noise = silent.standardise(pv.draw_codes(silent, 5))
    silent.forward = lambda z_t, t, labels: -3 * z_t
    z = silent.standardise(pv.draw_codes(silent, 5))
    assert torch.allclose(z, math.exp(-3) * noise, rtol=0.05, atol=1e-5)


def test_a_small_prior_learns_where_the_codes_of_each_class_lie(pv):
    """Birds and cats have codes of +1.5 and -1.5 with a spread of 0.2; codes of no class come from either."""
    torch.manual_seed(0)
    prior = pv.FlowPrior((1, 2, 2), ["bird", "cat"], 32, depth=1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
    for _ in range(200):
        sign = 1 - 2 * torch.randint(2, (128, 1))
        labels = torch.where(torch.rand(128) < 0.5, 0, (3 - sign[:, 0]) // 2)
        pv.flow_matching_loss(prior, 1.5 * sign + 0.2 * torch.randn(128, 4), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    birds, cats = (pv.draw_codes(prior, 64, name, guidance=1) for name in ("bird", "cat"))
    assert birds.mean().item() == pytest.approx(1.5, abs=0.2) and birds.std() < 0.5
    assert cats.mean().item() == pytest.approx(-1.5, abs=0.2) and cats.std() < 0.5
    any_class = pv.draw_codes(prior, 64).mean(dim=1)
    assert 0.2 < (any_class > 0).float().mean() < 0.8 and any_class.abs().mean() > 1


# Guidance and classes


def test_guidance_goes_from_the_field_of_no_class_through_that_of_the_class_and_beyond(pv, prior, codes):
    def velocity(label, guidance):
        return pv.velocity(prior, codes, 0.3, label, guidance)

    t = torch.full((5,), 0.3)
    anywhere, towards = (prior(codes, t, torch.full((5,), label)) for label in (0, 2))
    assert torch.equal(velocity(2, 1), towards)
    assert torch.allclose(velocity(2, 0), anywhere, atol=1e-5)
    for guidance in (0.5, 2, 3.5):
        expected = (1 - guidance) * anywhere + guidance * towards
        assert torch.allclose(velocity(2, guidance), expected, atol=1e-4)
    assert torch.equal(velocity(0, 1), anywhere) and torch.equal(velocity(0, 5), anywhere)


def test_guidance_and_class_reach_the_draws(pv, prior):
    drawn = [pv.draw_codes(prior, 2, "cat", guidance=guidance) for guidance in (1, 4, 7)]
    drawn += [pv.draw_codes(prior, 2, "horse"), pv.draw_codes(prior, 2)]
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in itertools.combinations(drawn, 2))
    assert torch.equal(drawn[1], pv.draw_codes(prior, 2, "cat"))
    assert torch.equal(drawn[4], pv.draw_codes(prior, 2, guidance=5))


@pytest.mark.parametrize("name, label", [("bird", 1), ("cat", 2), ("horse", 3), (None, 0)])
def test_each_class_has_a_label_of_its_own_counted_from_one(pv, silent, name, label):
    seen = []
    silent.forward = lambda z_t, t, labels: seen.append(labels) or torch.zeros_like(z_t)
    pv.draw_codes(silent, 2, name, guidance=1)
    assert {value for labels in seen for value in labels.tolist()} == {label}
    seen.clear()
    pv.draw_codes(silent, 2, name)
    assert {value for labels in seen for value in labels.tolist()} == {label, 0}


@pytest.mark.parametrize("strength", [0, 1])
def test_an_unknown_class_is_refused_with_those_that_are_known(pv, prior, codes, strength):
    with pytest.raises(pv.ReaderError, match="knows no class 'pegasus', only bird, cat, horse"):
        pv.mend_codes(prior, codes, strength, "pegasus")


@pytest.mark.parametrize("strength", [0, 0.5])
def test_codes_of_another_grid_are_refused(pv, prior, strength):
    with pytest.raises(pv.ReaderError, match=r"a grid \(2, 4, 4\), not for 64 numbers: load this model's"):
        pv.mend_codes(prior, torch.zeros(2, 64), strength)


# Mending


@pytest.fixture
def cells():
    """Another choice of cells for each of the codes; none for the first, all for the last."""
    torch.manual_seed(2)
    cells = torch.rand(5, 4, 4) < 0.4
    cells[0], cells[4] = False, True
    return cells


def test_mending_of_strength_zero_changes_no_bit_and_gives_a_copy(pv, prior, codes, cells):
    before = codes.clone()
    for mended in (pv.mend_codes(prior, codes, 0, "cat"), pv.mend_codes(prior, codes, 0, cells=cells)):
        assert torch.equal(mended, before)
        mended += 1
    assert torch.equal(codes, before)


def test_mending_of_strength_one_is_a_draw_whatever_the_code_was(pv, prior, codes):
    drawn = pv.draw_codes(prior, 5, "cat", guidance=3, seed=7)
    everywhere = torch.ones(5, 4, 4, dtype=torch.bool)
    assert drawn.shape == codes.shape and drawn.dtype == torch.float32 and not drawn.requires_grad
    assert torch.equal(pv.mend_codes(prior, codes, 1, "cat", guidance=3, seed=7), drawn)
    assert torch.equal(pv.mend_codes(prior, codes, 1, "cat", everywhere, guidance=3, seed=7), drawn)


@pytest.mark.parametrize("strength", [0.2, 0.7, 1])
def test_only_the_chosen_cells_change_and_all_other_numbers_stay_the_same_to_the_bit(pv, prior, codes, cells, strength):
    before = codes.clone()
    mended = pv.mend_codes(prior, codes, strength, "cat", cells)
    chosen = cells[:, None].expand(-1, 2, 4, 4).flatten(1)
    assert torch.equal(mended[~chosen], codes[~chosen]) and torch.equal(codes, before)
    assert (mended[chosen] != codes[chosen]).all()


def test_while_chosen_cells_are_redrawn_the_others_follow_the_line_to_their_code(pv, prior, codes, cells):
    noise = pv.FlowPrior(prior.grid, CLASSES, 24, depth=0)
    eps, seen, forward = pv.draw_codes(noise, 5, seed=4), [], prior.forward
    prior.forward = lambda z_t, t, labels: seen.append((z_t, t[:1])) or forward(z_t, t, labels)
    pv.mend_codes(prior, codes, 0.5, cells=cells, seed=4)
    kept = ~cells[:, None].expand(-1, 2, 4, 4).flatten(1)
    assert len(seen) == 16
    for z_t, t in seen[::2]:  # where a step begins
        line = (1 - t) * eps + t * prior.standardise(codes)
        assert torch.allclose(z_t[kept], line[kept], atol=1e-5)
        assert t == 0.5 or not torch.allclose(z_t[~kept], line[~kept], atol=1e-2)


def test_a_seed_gives_the_same_codes_again_whatever_was_drawn_before_and_another_seed_others(pv, prior, codes):
    def draw_and_mend(seed):
        return torch.cat([pv.draw_codes(prior, 5, seed=seed), pv.mend_codes(prior, codes, 0.5, seed=seed)])

    first = draw_and_mend(0)
    state = torch.get_rng_state()
    assert torch.equal(draw_and_mend(0), first) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(draw_and_mend(0), first)
    assert not torch.isclose(draw_and_mend(1), first).any()
    assert not torch.isclose(first[0], first[1]).any()  # nor are two draws of one seed alike


def test_a_code_is_mended_alike_whichever_are_mended_with_it(pv, prior, codes, cells, exact):
    together = pv.mend_codes(prior, codes, 0.6, "cat", cells, guidance=2)
    fewer = pv.mend_codes(prior, codes[:2], 0.6, "cat", cells[:2], guidance=2)
    assert torch.allclose(together[:2], fewer, atol=1e-4)
    assert torch.allclose(pv.draw_codes(prior, 100)[:1], pv.draw_codes(prior, 1), atol=1e-4)


def test_mending_leaves_the_prior_in_its_mode(pv, prior, codes):
    for training in (True, False):
        prior.train(training)
        pv.mend_codes(prior, codes, 0.5)
        assert prior.training == training


# The codes it learns from


def test_codes_are_means_of_the_images_and_of_their_mirror_images(pv, cfg, vae):
    codes, _ = pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))
    images = pv.load_images(cfg, "test")
    straight, mirrored = pv.encode_mean(vae, images), pv.encode_mean(vae, images.flip(3))
    assert codes.shape == (len(images), 2, 128) and codes.dtype == torch.float16
    spread = straight.std()
    assert (codes[:, 0] - straight).abs().max() < 0.1 * spread  # bfloat16 has been at work
    assert (codes[:, 1] - mirrored).abs().max() < 0.1 * spread
    assert (straight - mirrored).abs().max() > spread


def test_a_code_has_the_label_of_its_class_counted_from_one_and_zero_where_the_class_is_not_asked_for(pv, cfg, vae):
    _, labels = pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))
    _, kinds, classes = pv.load_split(cfg, "test")
    names = [classes[label] for label in kinds]
    assert labels.tolist() == [{"bird": 1, "cat": 2, "horse": 3}.get(name, 0) for name in names]
    _, labels = pv.load_codes(cfg, vae, "train+unlabeled", CLASSES, torch.device("cpu"))
    assert not labels[60:].any() and (labels[:60] > 0).sum() == 18


def test_codes_are_made_once(pv, cfg, vae, cached, monkeypatch):
    shutil.rmtree(cfg.output_dir / "cache")
    first, labels = pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))
    assert len(cached()) == 1
    monkeypatch.setattr(pv, "encode_mean", None)
    second, again = pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))
    assert torch.equal(first, second) and torch.equal(labels, again)


def test_other_weights_and_other_pictures_have_codes_of_their_own(pv, cfg, vae, cached, image_folder):
    def load(cfg, vae):
        return pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))[0]

    first, before = load(cfg, vae), cached()
    torch.manual_seed(1)
    others = load(cfg, pv.VAE(cfg))
    assert len(cached()) == 2 and others.shape == first.shape and not torch.allclose(others, first, atol=0.01)
    elsewhere = load(cfg.model_copy(update={"data_dir": image_folder}), vae)
    assert len(cached()) == 3 and len(elsewhere) == 10
    assert torch.equal(load(cfg, vae), first) and set(before) < set(cached())


@pytest.mark.parametrize("size", [0, 100, -100])
def test_a_torn_cache_is_made_anew(pv, cfg, vae, cached, size):
    first, _ = pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))
    expected = first.clone()  # the cache may be mapped into memory
    (name,) = cached()
    cache = cfg.output_dir / "cache" / name
    content = cache.read_bytes()
    cache.unlink()
    cache.write_bytes(content[:size])
    assert torch.equal(pv.load_codes(cfg, vae, "test", CLASSES, torch.device("cpu"))[0], expected)
    assert cache.read_bytes() == content


# The training


@pytest.fixture
def at_step(pv, monkeypatch):
    """at_step(n, act): call act() when the loss of the n-th training step from now is computed; its weights are not yet
    changed then."""

    def at_step(number, act):
        original, count = pv.flow_matching_loss, itertools.count(1)

        def flow_matching_loss(*arguments):
            loss = original(*arguments)
            if torch.is_grad_enabled() and next(count) == number:
                act()
            return loss

        monkeypatch.setattr(pv, "flow_matching_loss", flow_matching_loss)

    return at_step


def test_the_prior_knows_the_grid_the_classes_and_the_spread_of_the_codes(pv, trained):
    cfg, vae, prior, _ = trained
    assert prior.grid == (2, 8, 8) and not prior.training
    assert prior.classes == "airplane bird car cat deer dog horse monkey ship truck".split()
    codes, _ = pv.load_codes(cfg, vae, "train+unlabeled", prior.classes, torch.device("cpu"))
    assert (prior.mean[0] - prior.mean[1]).abs().item() > 0.01, "so the next line tells channels apart"
    for channel in prior.standardise(codes[:, 0].float()).unflatten(1, prior.grid).unbind(1):
        assert channel.mean().item() == pytest.approx(0, abs=1e-3)
        assert channel.std().item() == pytest.approx(1, abs=1e-2)


def test_each_epoch_has_a_record_and_the_held_out_loss_is_that_of_the_averaged_weights(pv, trained):
    cfg, vae, prior, history = trained
    assert [list(record) for record in history] == [["epoch", "lr", "loss", "test_loss", *TIMES]] * 2
    assert [record["epoch"] for record in history] == [1, 2]
    assert all(1.5 < record[name] < 2.5 for record in history for name in ("loss", "test_loss"))
    codes, labels = pv.load_codes(cfg, vae, "test", prior.classes, torch.device("cpu"))
    torch.manual_seed(cfg.seed)
    with torch.no_grad():
        loss = pv.flow_matching_loss(prior, prior.standardise(codes[:, 0].float()), labels).item()
    assert history[-1]["test_loss"] == pytest.approx(loss, abs=1e-6)


@pytest.fixture(scope="module")
def watched(trained, tmp_path_factory):
    """A run as that of trained, made again: of each step z, labels, and the weights before it; the learning rates; the
    state it left; and its outcome."""
    import pegasus_vae as pv

    cfg, steps, rates = grid_config(pv, tmp_path_factory.mktemp("watched")), [], []
    shutil.copytree(trained[0].output_dir / "cache", cfg.output_dir / "cache")
    compute, step = pv.flow_matching_loss, torch.optim.AdamW.step

    def flow_matching_loss(prior, z, labels):
        if torch.is_grad_enabled():
            weights = [weight.detach().clone() for weight in prior.parameters()]
            steps.append((z, labels, weights))
        return compute(prior, z, labels)

    def take_step(self, *more):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pv, "flow_matching_loss", flow_matching_loss)
        patch.setattr(torch.optim.AdamW, "step", take_step)
        prior, history = pv.fit_prior(cfg, trained[1])
    state = torch.load(cfg.checkpoint_dir / "runs" / f"{cfg.run_name}-prior" / "state.pt")
    return steps, rates, state, (prior, history)


def test_the_same_recipe_gives_the_same_prior(watched, assert_same):
    assert_same(watched[3])


def test_max_images_limits_what_the_prior_learns_from(pv, trained, tmp_path):
    cfg = grid_config(pv, tmp_path).model_copy(update={"max_images": 60, "epochs": 1})
    shutil.copytree(trained[0].output_dir / "cache", cfg.output_dir / "cache")
    pv.fit_prior(cfg, trained[1])
    state = torch.load(cfg.checkpoint_dir / "runs" / f"{cfg.run_name}-prior" / "state.pt")
    assert state["recipe"]["images"] == 60 and state["optimizer"]["state"][0]["step"] == 3


def test_the_learning_rate_rises_for_500_steps_while_it_falls_over_the_epochs(watched):
    _, rates, _, _ = watched
    assert rates == pytest.approx([1e-3 * (1 - step / 10) * (step + 1) / 500 for step in range(10)])


def test_later_only_the_epochs_lower_the_learning_rate_which_follows_that_of_the_settings(pv, cfg, vae, monkeypatch):
    rates, step, resume = [], torch.optim.AdamW.step, pv.TrainingRun.resume

    def begin_with_the_last_epoch(run):
        resume(run)
        run.epoch = 600

    def take_step(optimizer, *more):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *more)

    monkeypatch.setattr(pv.TrainingRun, "resume", begin_with_the_last_epoch)
    monkeypatch.setattr(torch.optim.AdamW, "step", take_step)
    pv.fit_prior(cfg.model_copy(update={"epochs": 601, "max_images": 20, "lr": 8e-4}), vae)
    assert rates == pytest.approx([2e-3 / 601])


def test_what_is_returned_and_exported_are_the_averaged_weights_not_the_last_ones(pv, trained, watched):
    steps, _, state, (prior, _) = watched
    names = [name for name, _ in prior.named_parameters()]
    last = [state["model"][f"prior.{name}"] for name in names]
    after = [weights for _, _, weights in steps[1:]] + [last]  # each step
    average = after[0]
    for weights in after[1:]:
        average = [0.999 * a + 0.001 * w for a, w in zip(average, weights)]
    for name, expected, final in zip(names, average, last):
        assert torch.allclose(prior.get_parameter(name), expected, rtol=1e-5, atol=1e-8), name
        changed = not torch.equal(final, after[0][names.index(name)])
        assert changed == (not torch.equal(prior.get_parameter(name), final)), name
    folder = trained[0].checkpoint_dir / "runs" / f"{trained[0].run_name}-prior"
    exported = load_file(folder / "prior.safetensors")
    assert all(torch.equal(exported[name], prior.get_parameter(name).half()) for name in names)


def test_half_of_each_batch_has_labels_most_of_them_horse_and_bird_and_all_codes_are_of_pictures(pv, trained, watched):
    cfg, vae, prior, _ = trained
    codes, all_labels = pv.load_codes(cfg, vae, "train+unlabeled", prior.classes, torch.device("cpu"))
    lines = [tuple(line.tolist()) for line in prior.standardise(codes.flatten(0, 1).float())]
    places = {line: divmod(i, 2) for i, line in enumerate(lines)}  # (picture, mirrored)
    seen, known, mirrored = [], [], []
    for z, labels, _ in watched[0]:
        assert len(z) == len(labels) == 40
        assert not labels[:20].any() and (labels[20:] > 0).all()
        found = [places[tuple(line.tolist())] for line in z]
        assert labels[20:].tolist() == [all_labels[picture].item() for picture, _ in found[20:]]
        seen += [picture for picture, _ in found[:20]]
        known += [picture for picture, _ in found[20:]]
        mirrored += [side for _, side in found]
    assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100)) and seen[:100] != seen[100:]
    assert len(set(known)) > 45  # of 60, in 200 draws; 52 are expected
    for name in ("horse", "bird"):  # two of ten classes, each of their pictures five times
        share = (all_labels[known] == prior.classes.index(name) + 1).float().mean().item()
        assert share == pytest.approx(5 / (2 * 5 + 8), abs=0.1)
    assert 140 < sum(mirrored) < 260


@pytest.mark.parametrize("step", [1, 8])
def test_the_stop_button_saves_and_returns_and_the_run_goes_on_exactly(
    pv, cfg, vae, run, capsys, at_step, assert_same, step
):
    at_step(step, press_stop)
    prior, history = pv.fit_prior(cfg, vae)
    assert len(history) == step // 5 and not prior.training
    assert "stopped" in capsys.readouterr().out and (run / "state.pt").exists()
    assert_same(pv.fit_prior(cfg, vae))


def test_a_run_that_crashed_inside_an_epoch_ends_as_if_it_had_not(pv, cfg, vae, at_step, assert_same):
    at_step(8, crash)
    with pytest.raises(Crash):
        pv.fit_prior(cfg, vae)
    assert_same(pv.fit_prior(cfg, vae))


def test_a_finished_run_is_returned_as_it_is(pv, trained, assert_same, at_step):
    at_step(1, crash)
    assert_same(pv.fit_prior(*trained[:2]))


def train_and_die(settings, weights, number, said):
    """Train, saving after every step, and die by SIGKILL in the step of that number; put where it was into said."""
    import pegasus_vae as pv

    minutes, steps, compute = itertools.count(), itertools.count(1), pv.flow_matching_loss

    def flow_matching_loss(*arguments):
        if torch.is_grad_enabled() and next(steps) == number:
            said.send(f"step {number}")
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*arguments)

    pv.flow_matching_loss = flow_matching_loss
    pv.time.monotonic = lambda: 61.0 * next(minutes)
    pv.tqdm.set_lock(threading.RLock())  # one that leaves nothing behind
    pv.fit_prior(pv.Config(**settings), pv.load_checkpoint(weights)[0])
    said.send("not killed")


def test_a_run_killed_inside_an_epoch_ends_bit_for_bit_like_one_that_was_not(pv, trained, cfg, vae, run, assert_same):
    weights = trained[0].checkpoint_dir / "runs" / cfg.run_name / "pegasus_vae.safetensors"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pegasus_vae"])  # imported once for all tests
    told, said = processes.Pipe(duplex=False)
    arguments = json.loads(cfg.model_dump_json()), weights, 8, said
    killed = processes.Process(target=train_and_die, args=arguments)
    killed.start()
    assert told.poll(300), "neither killed nor finished"
    assert told.recv() == "step 8"
    killed.join(120)
    assert killed.exitcode == -signal.SIGKILL
    state = torch.load(run / "state.pt")
    assert (state["epoch"], state["step"]) == (1, 2)
    assert_same(pv.fit_prior(cfg, vae))


def test_another_recipe_and_codes_of_other_weights_are_refused_and_the_state_is_kept(pv, cfg, vae, run, at_step):
    at_step(7, press_stop)
    pv.fit_prior(cfg, vae)
    before = (run / "state.pt").read_bytes()
    with pytest.raises(pv.ReaderError, match="cannot be used .*base_channels was 8, is 12.*choose a new run_name"):
        pv.fit_prior(cfg.model_copy(update={"base_channels": 12}), vae)
    torch.manual_seed(1)
    with pytest.raises(pv.ReaderError, match=r"cannot be used \(data was \d+, is \d+\)"):
        pv.fit_prior(cfg, pv.VAE(cfg))
    assert (run / "state.pt").read_bytes() == before


@pytest.mark.parametrize("image_size, latent_size", [(32, 1), (48, 3)])
def test_a_grid_that_has_no_blocks_of_four_cells_is_refused_in_one_line(pv, cfg, image_size, latent_size):
    cfg = cfg.model_copy(update={"image_size": image_size, "latent_size": latent_size, "latent_dim": 18})
    with pytest.raises(pv.ReaderError, match=f"^[^\n]*latent_size {latent_size} is not even$"):
        pv.fit_prior(cfg, pv.VAE(cfg))


# Files


@pytest.fixture
def exported(trained, tmp_path):
    """A copy of the file that fit_prior wrote."""
    cfg = trained[0]
    return shutil.copy(cfg.checkpoint_dir / "runs" / f"{cfg.run_name}-prior" / "prior.safetensors", tmp_path)


def test_a_prior_comes_back_in_half_precision_in_evaluation_mode_with_its_recipe(pv, trained, exported):
    cfg, _, prior, _ = trained
    loaded, info = pv.load_prior(exported)
    assert loaded.grid == prior.grid and loaded.classes == prior.classes and not loaded.training
    for name, tensor in prior.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert info["recipe"]["epochs"] == cfg.epochs and info["recipe"]["images"] == 100
    drawn, expected = (pv.draw_codes(which, 3, "horse") for which in (loaded, prior))
    assert torch.allclose(drawn, expected, atol=0.02 * expected.std().item())


def test_a_file_that_holds_no_usable_prior_is_refused_by_name_with_what_to_do(pv, trained, exported):
    def refused(path, reason):
        with pytest.raises(pv.ReaderError, match=f"{path} ?{reason}.*: restore it .*, or train with --mode paper$"):
            pv.load_prior(path)

    of_vae = trained[0].checkpoint_dir / "runs" / trained[0].run_name / "pegasus_vae.safetensors"
    refused(of_vae, "holds no weights of this notebook .KeyError")
    os.truncate(exported, os.path.getsize(exported) - 100)
    refused(exported, "holds no weights of this notebook .SafetensorError")
    with open(exported, "w") as file:
        file.write("<html>404</html>")
    refused(exported, "holds no weights of this notebook .SafetensorError")
    os.unlink(exported)
    refused(exported, "holds no weights of this notebook .FileNotFoundError")


def test_a_prior_is_no_checkpoint_of_a_vae(pv, exported):
    with pytest.raises(pv.ReaderError, match=f"{exported} holds no weights of this notebook .*: restore it"):
        pv.load_checkpoint(exported)


# Pegasi that nobody arranged


def test_the_cells_that_are_mended_are_those_of_the_chosen_blocks_and_their_neighbours(pv):
    block = [list("." * 8) for _ in range(8)]
    block[2][3] = "#"
    composition = pv.Composition(bird=0, cells=["".join(row) for row in block])
    cells = pv.wing_cells([pv.Composition(bird=0), composition], 16)  # two cells a block
    assert not cells[0].any() and cells.dtype == torch.bool
    expected = torch.zeros(16, 16, dtype=torch.bool)
    expected[3:7, 5:9] = True
    assert torch.equal(cells[1], expected)


def test_a_prior_that_knows_no_classes_has_no_evidence_for_any(pv, silent, codes):
    assert torch.equal(pv.class_evidence(silent, codes, ["horse", "bird"]), torch.zeros(2, 5, 4, 4))


def test_there_is_evidence_where_the_class_explains_the_code_and_against_it_where_not(pv, silent, exact, monkeypatch):
    """The stub predicts the way to a code of ones in the left half, if it is told the class, and else none."""
    ones = torch.zeros(2, 4, 4)
    ones[:, :, :2] = 1
    ones = ones.flatten()

    def velocity(prior, z_t, t, label, guidance):
        exact_field = (ones - z_t) / (1 - t)
        return exact_field * ones if label == CLASSES.index("bird") + 1 else torch.zeros_like(z_t)

    monkeypatch.setattr(pv, "velocity", velocity)
    evidence, none = pv.class_evidence(silent, silent.restore(torch.stack([ones, -3 * ones])), ["bird", "cat"])
    assert (evidence[0, :, :2] > 0).all() and (evidence[:, :, 2:] == 0).all()
    assert evidence[1, :, :2].mean() < 0 and (none == 0).all()


@pytest.fixture
def horse_mu(pv, trained):
    """Codes of three horses."""
    return pv.encode_mean(trained[1], pv.load_images(trained[0], "test", "horse")[:3])


@pytest.fixture
def birds(pv, trained):
    return pv.load_images(trained[0], "test", "bird")


@pytest.fixture
def made(pv):
    """How three horses got their wings."""
    return [pv.Composition(bird=bird, cells=("." * 8, "..####..", *["." * 8] * 6)) for bird in (0, 2, 5)]


def test_a_search_returns_the_codes_of_the_compositions_that_it_found(pv, trained, horse_mu, birds, made):
    z, found = pv.search(trained[1], trained[2], horse_mu, birds, made)
    assert torch.equal(z, pv.compose(trained[1], horse_mu, birds[[c.bird for c in found]], found))
    assert all(composition in made and composition != own for composition, own in zip(found, made))


@pytest.mark.parametrize("what", ["bird", "horse", "light"])
def test_of_two_proposals_the_one_with_more_evidence_or_light_wins(
    pv, trained, horse_mu, birds, made, monkeypatch, what
):
    def found_by(wanted):
        """What is found if only the first (0) or second (1) proposals show what counts; all else differs by horse."""

        def shown(z, name):
            index = torch.arange(len(z))  # two proposals for each of three horses
            return (index // 3 == wanted).float() if name == what else index % 3.0

        def evidence(prior, z, names):
            return torch.stack([shown(z, name) for name in names])[:, :, None, None].expand(-1, -1, 8, 8)

        def drawn(vae, z):
            light = shown(z, "light") if len(z) == 6 else torch.zeros(3)
            return light[:, None, None, None].expand(-1, 3, 8, 8)

        monkeypatch.setattr(pv, "class_evidence", evidence)
        monkeypatch.setattr(pv, "decode_images", drawn)
        return pv.search(trained[1], trained[2], horse_mu, birds, made)[1]

    assert found_by(0) == [made[1], made[2], made[0]]
    assert found_by(1) == [made[2], made[0], made[1]]


def test_each_horse_tries_the_wings_of_the_twelve_that_follow_it(pv, birds, monkeypatch):
    class Seen(Exception):
        """Raised in place of composing."""

    def compose(vae, horse_mu, images, compositions):
        raise Seen([composition.bird for composition in compositions])

    monkeypatch.setattr(pv, "compose", compose)
    with pytest.raises(Seen) as seen:
        pv.search(None, None, torch.zeros(15, 4), birds, [pv.Composition(bird=bird) for bird in range(15)])
    tried = torch.tensor(seen.value.args[0]).view(12, 15)
    assert all(tried[:, horse].tolist() == [(horse + shift) % 15 for shift in range(1, 13)] for horse in range(15))


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_a_strength_out_of_range_is_refused(pv, prior, codes, strength):
    with pytest.raises(pv.ReaderError, match="between 0 and 1"):
        pv.mend_codes(prior, codes, strength)
