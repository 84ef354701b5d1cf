"""The network, the loss, and the ways between pictures and codes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn


@pytest.fixture
def vae(pv, cfg):
    """A small untrained VAE whose batch norms have seen a few pictures."""
    torch.manual_seed(0)
    vae = pv.VAE(cfg)
    for _ in range(3):
        vae(torch.rand(8, 3, cfg.image_size, cfg.image_size))
    return vae.eval()


@pytest.fixture
def pictures(cfg):
    """Nine random pictures, uint8, without pure black and white."""
    torch.manual_seed(1)
    return torch.randint(1, 255, (9, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)


@pytest.fixture
def posterior():
    """mu and logvar, (4, 6) each, that ask for gradients."""
    torch.manual_seed(2)
    return torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)


@pytest.mark.parametrize("blocks_per_stage", [1, 2])
@pytest.mark.parametrize("image_size", [32, 64, 96])
def test_shapes_fit_at_every_image_size_and_depth(pv, cfg, image_size, blocks_per_stage):
    cfg = cfg.model_copy(update={"image_size": image_size, "blocks_per_stage": blocks_per_stage})
    images = torch.rand(2, 3, image_size, image_size)
    logits, mu, logvar = pv.VAE(cfg)(images)
    assert logits.shape == images.shape
    assert mu.shape == logvar.shape == (2, cfg.latent_dim)


@pytest.mark.parametrize("image_size, latent_size", [(64, 8), (64, 4), (64, 16), (32, 8), (128, 8)])
def test_a_code_spread_over_a_grid_has_the_same_length_and_an_encoder_that_stops_there(
    pv, cfg, image_size, latent_size
):
    change = {"image_size": image_size, "latent_size": latent_size, "latent_dim": 512}
    vae = pv.VAE(pv.Config(**cfg.model_dump() | change))
    images = torch.rand(2, 3, image_size, image_size)
    logits, mu, logvar = vae(images)
    assert logits.shape == images.shape and mu.shape == logvar.shape == (2, 512)
    assert vae.encoder.stages(images).shape[2:] == (latent_size, latent_size)
    assert vae.decoder.grid == (512 // latent_size**2, latent_size, latent_size)


def test_a_cell_of_the_grid_is_drawn_in_its_place(pv, cfg):
    torch.manual_seed(0)
    vae = pv.VAE(pv.Config(**cfg.model_dump() | {"latent_size": 8, "latent_dim": 512, "image_size": 64})).eval()
    z = torch.zeros(2, 512)
    z[1].view(8, 8, 8)[:, 1, 6] = 5.0  # second row, seventh column
    with torch.no_grad():
        change = (vae.decoder(z[1:]) - vae.decoder(z[:1])).abs().sum(dim=1)[0]
    row, column = divmod(change.flatten().argmax().item(), 64)
    assert 0 <= row < 32 and 36 <= column < 64
    assert change[48:, :16].max() < 0.01 * change.max(), "what is far away is hardly touched"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_size": 96, "latent_size": 8}, "latent_size 8 is not even, or not image_size 96 halved a few times"),
        ({"image_size": 64, "latent_size": 64}, "latent_size 64 is not even, or not image_size 64 halved"),
        ({"image_size": 48, "latent_size": 3, "latent_dim": 18}, "latent_size 3 is not even"),
        ({"image_size": 64, "latent_size": 8, "latent_dim": 500}, "latent_dim 500 cannot be spread over 8x8"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(pv, cfg, change, message):
    with pytest.raises(ValueError, match=message):
        pv.Config(**cfg.model_dump() | {"latent_dim": 512} | change)


@pytest.mark.parametrize(
    "settings, side, numbers",
    [
        ({}, 16, 1024),
        ({"latent_dim": 200}, 16, 256),
        ({"image_size": 32, "latent_dim": 16}, 8, 64),
        ({"image_size": 96, "latent_dim": 700}, 24, 1152),
    ],
)
def test_the_grid_has_a_cell_for_4x4_pixels_and_twice_as_many_numbers_if_they_can_be_spread(
    pv, cfg, settings, side, numbers
):
    cfg = pv.Config(**cfg.model_dump() | {"image_size": 64, "latent_dim": 512, "run_name": "x"} | settings)
    grid = pv.spatial(cfg)
    assert (grid.latent_size, grid.latent_dim, grid.run_name) == (side, numbers, "x-spatial")
    changed = {name for name, value in grid if value != getattr(cfg, name)}
    assert changed <= {"latent_size", "latent_dim", "run_name"}
    assert pv.Config(**grid.model_dump()) == grid, "a grid that fits"


@pytest.mark.parametrize(
    "settings, count",
    [({"latent_dim": 512}, 19_753_331), ({"latent_dim": 512, "latent_size": 8}, 1_952_643)]
    + [({"latent_dim": 1024, "latent_size": 16}, 451_451)],
    ids=["the paper's", "512 numbers on 8x8", "the last chapter's"],
)
def test_the_network_is_as_large_as_the_text_says(pv, cfg, settings, count):
    with torch.device("meta"):
        vae = pv.VAE(cfg.model_copy(update={"image_size": 64, "base_channels": 64} | settings))
    assert sum(p.numel() for p in vae.parameters()) == count


@pytest.mark.parametrize("latent_size, depths", [(1, [9, 17, 25]), (8, [5, 9, 13])])
def test_more_blocks_a_stage_make_a_deeper_network_whose_added_shortcuts_change_nothing(pv, cfg, latent_size, depths):
    for blocks, depth in zip((1, 2, 3), depths):
        change = {"image_size": 32, "latent_size": latent_size, "latent_dim": 512, "blocks_per_stage": blocks}
        found = [m for m in pv.VAE(cfg.model_copy(update=change)).modules() if isinstance(m, pv.ResidualBlock)]
        assert len(found) == depth
        assert sum(isinstance(block.skip, nn.Identity) for block in found) == depth - depths[0]


@pytest.mark.parametrize("kind", ["EncoderBlock", "DecoderBlock"])
def test_the_shortcut_skips_one_convolution_two_batch_norms_and_one_activation(pv, kind):
    block = getattr(pv, kind)(8, 16)
    counts = {
        layer: [sum(isinstance(m, layer) for m in path.modules()) for path in (block.main, block.skip)]
        for layer in (nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU)
    }
    assert counts == {nn.Conv2d: [2, 1], nn.BatchNorm2d: [2, 0], nn.LeakyReLU: [1, 0]}
    assert not any(isinstance(m, nn.Dropout) for m in block.modules())


@pytest.mark.parametrize("kind", ["EncoderBlock", "DecoderBlock"])
@pytest.mark.parametrize("channels, scale, plain", [((8, 8), 1, True), ((8, 16), 1, False), ((8, 8), 2, False)])
def test_a_shortcut_with_nothing_to_change_is_the_identity(pv, kind, channels, scale, plain):
    block, x = getattr(pv, kind)(*channels, scale=scale), torch.randn(2, channels[0], 8, 8)
    assert (list(block.skip.parameters()) == []) is plain
    for parameter in block.main.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(block(x), F.leaky_relu(block.skip(x), 0.2))
    assert torch.equal(block.skip(x), x) if plain else block.skip(x).shape != x.shape


@pytest.mark.parametrize("silenced, heard", [("main", "skip"), ("skip", "main")])
def test_a_block_activates_the_sum_of_its_two_paths(pv, silenced, heard):
    torch.manual_seed(0)
    block, x = pv.EncoderBlock(8, 16), torch.randn(2, 8, 8, 8)
    with torch.no_grad():
        for parameter in getattr(block, silenced).parameters():
            parameter.zero_()
    assert torch.allclose(block(x), F.leaky_relu(getattr(block, heard)(x), 0.2))


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_both_paths_of_a_block_resize_by_averages_down_and_by_nearest_neighbour_up(pv, scale):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    encoder, decoder = pv.EncoderBlock(8, 16, scale), pv.DecoderBlock(8, 16, scale)
    assert encoder(x).shape == (2, 16, 8 // scale, 8 // scale)
    assert decoder(x).shape == (2, 16, 8 * scale, 8 * scale)
    means = x.unflatten(3, (-1, scale)).unflatten(2, (-1, scale)).mean(dim=(3, 5))
    squares = x.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    for block, resized in ((encoder, means), (decoder, squares)):
        assert torch.allclose(block.skip(x), block.skip[-1](resized), atol=1e-5)


@pytest.mark.parametrize("blocks_per_stage", [1, 2])
def test_gradients_reach_every_parameter(pv, cfg, blocks_per_stage):
    torch.manual_seed(0)
    vae = pv.VAE(cfg.model_copy(update={"blocks_per_stage": blocks_per_stage}))
    images = torch.rand(4, 3, cfg.image_size, cfg.image_size)
    logits, mu, logvar = vae(images)
    pv.vae_loss(logits, images, mu, logvar).total.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or parameter.ndim == 1, name  # a bias before a batch norm changes nothing


def test_the_divergence_agrees_with_torch_distributions(pv, posterior):
    mu, logvar = posterior
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, torch.exp(0.5 * logvar)), normal(0.0, 1.0)).sum(dim=1)
    assert torch.allclose(pv.kl_divergence(mu, logvar), exact, rtol=1e-5)


def test_the_divergence_agrees_with_monte_carlo(pv, posterior):
    mu, logvar = (t.detach() for t in posterior)
    q, p = (
        torch.distributions.Normal(mu, torch.exp(0.5 * logvar)),
        torch.distributions.Normal(0.0, 1.0),
    )
    torch.manual_seed(3)
    z = q.sample((100_000,))
    drawn = (q.log_prob(z) - p.log_prob(z)).sum(dim=2).mean(dim=0)
    assert torch.allclose(pv.kl_divergence(mu, logvar), drawn, rtol=0.02)


def test_the_divergence_is_zero_at_the_prior_and_nowhere_negative(pv):
    assert pv.kl_divergence(torch.zeros(2, 6), torch.zeros(2, 6)).tolist() == [0, 0]
    torch.manual_seed(4)
    for spread in (0.01, 1, 5):
        assert (pv.kl_divergence(spread * torch.randn(100, 6), spread * torch.randn(100, 6)) > 0).all()


def test_draws_have_the_posteriors_mean_and_standard_deviation(pv):
    torch.manual_seed(5)
    mu, logvar = torch.tensor([[2.0, -1.0]]), torch.tensor([[math.log(0.25), math.log(4.0)]])
    z = pv.reparameterize(mu.expand(50_000, -1), logvar.expand(50_000, -1))
    assert torch.allclose(z.mean(dim=0), mu[0], atol=0.05)
    assert torch.allclose(z.std(dim=0), torch.tensor([0.5, 2.0]), rtol=0.02)
    assert abs(torch.corrcoef(z.T)[0, 1]) < 0.02


def test_draws_pass_exact_gradients_to_mean_and_log_variance(pv, posterior):
    mu, logvar = posterior
    z = pv.reparameterize(mu, logvar)
    z.sum().backward()
    assert (mu.grad == 1).all()
    assert torch.allclose(logvar.grad, 0.5 * (z - mu).detach(), atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_what_one_computes_by_hand(pv, posterior, reduction):
    torch.manual_seed(6)
    logits, images = torch.randn(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    p = torch.sigmoid(logits)
    bce = -(images * p.log() + (1 - images) * (1 - p).log())  # of each number
    kl = -0.5 * (1 + posterior[1] - posterior[0] ** 2 - posterior[1].exp())  # of each latent number
    expected = (bce.mean(), kl.mean()) if reduction == "mean" else (bce.sum() / 4, kl.sum() / 4)
    loss = pv.vae_loss(logits, images, *posterior, kl_weight=0.3, reduction=reduction)
    assert torch.allclose(loss.bce, expected[0], rtol=1e-5)
    assert torch.allclose(loss.kl, expected[1], rtol=1e-5)
    assert torch.allclose(loss.total, loss.bce + 0.3 * loss.kl)


def test_the_loss_is_the_papers_unless_told_otherwise(pv, posterior):
    logits, images = torch.zeros(4, 3, 2, 2), torch.rand(4, 3, 2, 2)
    assert pv.vae_loss(logits, images, *posterior) == pv.vae_loss(logits, images, *posterior, 0.01, "mean")


def test_the_forward_pass_decodes_a_draw_and_not_the_mean(vae, pictures):
    x = pictures.float() / 255
    torch.manual_seed(7)
    first, mu, _ = vae(x)
    second, again, _ = vae(x)
    assert torch.equal(mu, again) and not torch.equal(first, second)


def test_a_code_does_not_depend_on_the_other_pictures_of_the_batch(pv, vae, pictures):
    vae.train()
    together = pv.encode_mean(vae, pictures)
    alone = torch.cat([pv.encode_mean(vae, picture[None]) for picture in pictures])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_encoding_and_decoding_ignore_the_models_mode_and_leave_the_model_as_it_was(pv, vae, pictures, training):
    expected = pv.encode_mean(vae.eval(), pictures), pv.decode_images(vae, torch.ones(2, 16))
    before = {name: t.clone() for name, t in vae.state_dict().items()}
    vae.train(training)
    assert torch.equal(pv.encode_mean(vae, pictures), expected[0])
    assert torch.equal(pv.decode_images(vae, torch.ones(2, 16)), expected[1])
    assert vae.training is training
    assert all(torch.equal(t, before[name]) for name, t in vae.state_dict().items())


def test_bytes_and_floats_are_encoded_alike(pv, vae, pictures):
    assert torch.equal(pv.encode_mean(vae, pictures), pv.encode_mean(vae, pictures.float() / 255))


def test_codes_are_posterior_means_on_the_cpu_without_gradients_in_order(pv, vae, cfg):
    torch.manual_seed(8)
    many = torch.rand(130, 3, cfg.image_size, cfg.image_size)  # more than one batch
    codes = pv.encode_mean(vae, many)
    assert codes.shape == (130, cfg.latent_dim) and codes.dtype == torch.float32 and not codes.requires_grad
    with torch.no_grad():
        assert torch.allclose(codes[[0, 70, 129]], vae.encoder(many[[0, 70, 129]])[0], atol=1e-4)


def test_decoded_images_are_brightnesses_from_zero_to_one(pv, vae, cfg):
    torch.manual_seed(9)
    z = 20 * torch.randn(70, cfg.latent_dim)
    images = pv.decode_images(vae, z)
    assert images.shape == (70, 3, cfg.image_size, cfg.image_size) and images.dtype == torch.float32
    assert 0 <= images.min() < 0.5 < images.max() <= 1 and not images.requires_grad
    with torch.no_grad():
        assert torch.allclose(images[69:], torch.sigmoid(vae.decoder(z[69:])), atol=1e-4)


def test_evaluate_agrees_with_a_direct_computation(pv, vae, pictures):
    x = pictures.double() / 255
    copies = pv.decode_images(vae, pv.encode_mean(vae, pictures)).double()
    mse = (copies - x).square().mean(dim=(1, 2, 3))
    bce = -(x * copies.log() + (1 - x) * (1 - copies).log()).mean(dim=(1, 2, 3))
    floor = -(x * x.log() + (1 - x) * (1 - x).log()).mean(dim=(1, 2, 3))
    direct = torch.stack([bce, floor, mse, 10 * torch.log10(1 / mse)], dim=1).float()
    assert torch.allclose(pv.evaluate(vae, pictures), direct, rtol=0.02)  # autocast may round the copies


@pytest.mark.parametrize(
    "able, fast",
    [({"avx512_bf16": True}, True), ({"amx_bf16": True, "avx512_bf16": False}, True), ({"avx512_f": True}, False)]
    + [({}, False), (None, False)],
)
def test_a_cpu_that_multiplies_16_bits_fast_does_so(pv, monkeypatch, able, fast):
    if able is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    with pv.mixed_precision(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") is fast
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("major, fast", [(8, True), (9, True), (7, False)])
def test_a_gpu_that_multiplies_16_bits_fast_does_so(pv, monkeypatch, major, fast):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch, "autocast", lambda *how, enabled: asked.append((*how, enabled)))
    pv.mixed_precision(torch.device("cuda", 1))
    assert asked == [("cuda", torch.bfloat16, fast)]


def test_losses_are_taken_in_full_precision_where_the_network_is_not(pv, cfg, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    vae, x = pv.VAE(cfg), torch.rand(4, 3, cfg.image_size, cfg.image_size)
    loss = pv.batch_loss(vae, x, cfg)
    loss.total.backward()
    assert all(part.dtype == torch.float32 for part in loss)
    logits, mu = (3 * torch.randn(x.shape)).bfloat16(), torch.zeros(4, 2)
    assert pv.vae_loss(logits, x, mu, mu).bce == pv.vae_loss(logits.float(), x, mu, mu).bce
    assert all(parameter.grad.dtype == torch.float32 for parameter in vae.parameters())


def test_a_batch_is_prepared_as_floats_whose_channels_lie_side_by_side(pv, pictures):
    x = pv.prepare_batch(pictures, torch.device("cpu"))
    assert torch.equal(x, pictures / 255) and x.is_contiguous(memory_format=torch.channels_last)


class Copier(nn.Module):
    """A model whose copies are perfect: the code is the picture."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(1))

    def encoder(self, images):
        return images, None

    def decoder(self, z):
        return torch.logit(z)


def test_a_perfect_copy_has_the_floor_as_its_bce(pv, pictures):
    bce, floor, mse, psnr = pv.evaluate(Copier(), pictures).T
    assert torch.allclose(bce, floor, atol=1e-5) and (floor > 0.3).all()
    assert (mse < 1e-10).all() and (psnr > 100).all()


def test_no_copy_has_a_bce_below_the_floor(pv, vae, pictures):
    bce, floor, _, _ = pv.evaluate(vae, pictures).T
    assert (bce > floor).all()


def test_a_gaussian_of_codes_has_their_mean_and_covariance_though_they_are_few(pv):
    torch.manual_seed(10)
    codes = torch.randn(500, 6) @ torch.randn(6, 6) + torch.arange(6.0)
    gaussian = pv.fit_gaussian(codes)
    assert torch.allclose(gaussian.mean, codes.mean(dim=0))
    assert torch.allclose(gaussian.covariance_matrix, torch.cov(codes.T), atol=2e-3)
    drawn = gaussian.sample((20_000,))
    assert torch.allclose(torch.cov(drawn.T), torch.cov(codes.T), atol=0.05 * codes.var(dim=0).max())
    assert pv.fit_gaussian(codes[:3]).sample((2,)).shape == (2, 6)
