"""Mixing codes, and the measures by which pictures are sorted and pegasi judged."""

import math

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def parents():
    """Codes of three horses and three birds, and which birds have dark wings."""
    torch.manual_seed(0)
    return torch.randn(3, 16), torch.randn(3, 16), torch.tensor([False, True, False])


def paint(*boxes, size=64):
    """One picture (1, 3, size, size), uint8, of boxes (left, top, right, bottom, colour), the first one over all."""
    picture = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    for left, top, right, bottom, colour in boxes:
        picture[0, :, top:bottom, left:right] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    return picture


def paint_all(colour):
    return paint((0, 0, 64, 64, colour))


WHITE, BLACK, RED, BROWN, SKY, GRASS = (
    (255, 255, 255),
    (0, 0, 0),
    (255, 0, 0),
    (110, 70, 40),
    (200, 220, 250),
    (40, 90, 40),
)


def test_weight_one_is_the_horse(pv, parents):
    assert torch.equal(pv.make_pegasus(*parents, 1.0), parents[0])


def test_weight_zero_is_the_bird_negated_where_its_wings_are_dark(pv, parents):
    horse, bird, dark = parents
    assert torch.equal(pv.make_pegasus(horse, bird, dark, 0.0), torch.stack([bird[0], -bird[1], bird[2]]))


def test_flipping_twice_changes_nothing(pv, parents):
    horse, bird, _ = parents
    all_dark, none_dark = torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)
    once = pv.make_pegasus(horse, bird, all_dark, 0.0)
    assert torch.equal(once, -bird)
    assert torch.equal(pv.make_pegasus(horse, once, all_dark), pv.make_pegasus(horse, bird, none_dark))


def test_by_default_six_tenths_are_horse_and_four_tenths_bird(pv):
    horse, bird = torch.tensor([[1.0, 10.0], [1.0, 10.0]]), torch.tensor([[2.0, -5.0], [2.0, -5.0]])
    pegasus = pv.make_pegasus(horse, bird, torch.tensor([False, True]))
    assert torch.allclose(pegasus, torch.tensor([[1.4, 4.0], [-0.2, 8.0]]))


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_zero_to_one_is_refused(pv, parents, weight):
    with pytest.raises(ValueError, match=f"horse_weight.*{weight}"):
        pv.make_pegasus(*parents, weight)


@pytest.mark.parametrize(
    "horses, birds, marks",
    [
        ((3, 16), (2, 16), (3,)),
        ((3, 16), (3, 8), (3,)),
        ((3, 16), (3, 16), (2,)),
        ((3, 16), (3, 16), (3, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_and_named(pv, horses, birds, marks):
    with pytest.raises(ValueError) as refusal:
        pv.make_pegasus(torch.zeros(horses), torch.zeros(birds), torch.zeros(marks, dtype=torch.bool))
    assert all(str(shape) in str(refusal.value) for shape in (horses, birds, marks))


def test_restore_norm_keeps_the_direction_and_takes_the_parents_mean_length(pv, parents):
    horse, bird, dark = parents
    z = pv.make_pegasus(horse, bird, dark)
    stretched = pv.restore_norm(z, horse, bird)
    assert torch.allclose(torch.cosine_similarity(stretched, z), torch.ones(3))
    assert torch.allclose(stretched.norm(dim=1), 0.6 * horse.norm(dim=1) + 0.4 * bird.norm(dim=1))


def test_slerp_goes_from_bird_to_horse(pv, parents):
    horse, bird, _ = parents
    assert torch.allclose(pv.slerp(horse, bird, 1.0), horse, atol=1e-5)
    assert torch.allclose(pv.slerp(horse, bird, 0.0), bird, atol=1e-5)


def test_slerp_keeps_the_length_and_divides_the_angle(pv, parents):
    horse, bird = (torch.nn.functional.normalize(codes) for codes in parents[:2])
    point = pv.slerp(horse, bird, 0.6)
    angle, whole = torch.acos((point * horse).sum(dim=1)), torch.acos((bird * horse).sum(dim=1))
    assert torch.allclose(point.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(angle, 0.4 * whole, atol=1e-3)


def test_slerp_survives_parallel_codes(pv, parents):
    horse = parents[0]
    assert torch.allclose(pv.slerp(horse, horse), horse, atol=1e-3)
    assert pv.slerp(horse, -horse).isfinite().all()


@pytest.mark.parametrize("colour, expected", [(BLACK, 0), (WHITE, 1), (RED, 0), ((51, 51, 51), 0.2)])
def test_whiteness_is_one_for_white_and_zero_for_black_and_for_pure_colours(pv, colour, expected):
    picture = paint_all(colour)
    assert pv.whiteness(picture).tolist() == pytest.approx([expected])
    assert pv.whiteness(picture.float() / 255).tolist() == pytest.approx([expected])


def test_whiteness_looks_at_the_middle_only(pv):
    assert pv.whiteness(paint((0, 0, 64, 64, BLACK), (16, 16, 48, 48, WHITE))) == 1


def test_whitest_first_prefers_a_white_horse_to_a_bright_sky(pv):
    grey_horse = paint((0, 0, 64, 64, GRASS), (18, 24, 46, 44, (120, 120, 120)))
    brown_horse_before_sky = paint((0, 0, 64, 64, SKY), (18, 24, 46, 44, BROWN))
    white_horse = paint((0, 0, 64, 64, GRASS), (18, 24, 46, 44, WHITE))
    pictures = torch.cat([grey_horse, brown_horse_before_sky, white_horse, paint_all(SKY)])
    assert pv.whitest_first(pictures)[0] == 2
    assert sorted(pv.whitest_first(pictures)) == [0, 1, 2, 3]


def test_widest_first_prefers_outstretched_wings(pv):
    torch.manual_seed(0)
    folded = paint((0, 0, 64, 64, SKY), (26, 14, 38, 54, BROWN))
    noise = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    wide = paint((0, 0, 64, 64, SKY), (6, 26, 58, 34, BROWN))
    speck = paint((0, 0, 64, 64, SKY), (30, 30, 33, 33, BROWN))
    pictures = torch.cat([folded, noise, speck, wide])
    assert pv.widest_first(pictures)[0] == 3
    assert sorted(pv.widest_first(pictures)) == [0, 1, 2, 3]


def test_diversity_is_zero_for_equal_images_and_one_between_black_and_white(pv):
    assert pv.diversity(paint_all(RED).expand(5, -1, -1, -1)) == 0
    assert pv.diversity(torch.cat([paint_all(BLACK), paint_all(WHITE)])) == pytest.approx(1)
    assert pv.diversity(torch.cat([paint_all(BLACK)] * 2 + [paint_all(WHITE)])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("chunk", [3, 2048])
def test_nearest_finds_each_picture_itself_at_no_distance(pv, chunk):
    torch.manual_seed(0)
    pool = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    found, distance = pv.nearest(pool[[7, 0, 4]], pool, chunk=chunk)
    assert found.tolist() == [[7], [0], [4]]
    assert distance.flatten().tolist() == pytest.approx([0, 0, 0], abs=0.05)


def test_nearest_gives_the_euclidean_distance(pv):
    pool = torch.tensor([[3.0, 4.0], [9.0, 10.0]])
    found, distance = pv.nearest(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), pool)
    assert found.tolist() == [[0], [1]] and distance.flatten().tolist() == pytest.approx([5, 1])


@pytest.mark.parametrize("chunk", [2, 2048])
def test_several_nearest_come_in_the_order_of_their_distance(pv, chunk):
    pool = torch.tensor([[4.0], [1.0], [9.0], [2.0], [0.5]])
    found, distance = pv.nearest(torch.tensor([[0.0], [9.0]]), pool, 3, chunk)
    assert found.tolist() == [[4, 1, 3], [2, 0, 3]] and distance.tolist() == [[0.5, 1, 2], [0, 5, 7]]
    assert pv.nearest(pool, pool, 99)[0].shape == (5, 5)


@pytest.fixture
def shipped(pv, cfg, tmp_path):
    """Settings without data, a model, and its codes of three horses in the shipped file."""
    cfg = cfg.model_copy(update={"data_dir": tmp_path / "no data"})
    torch.manual_seed(1)
    vae = pv.VAE(cfg)
    codes = {"horse_latents": torch.randn(3, cfg.latent_dim).half(), "horse_crc32": torch.tensor([5, 6, 7])}
    cfg.checkpoint_dir.mkdir()
    save_file(codes, cfg.checkpoint_dir / "candidates.safetensors", {"weights": pv.weights_digest(vae)})
    return cfg, vae, codes


def test_without_data_the_candidates_are_drawn_from_the_shipped_codes(pv, shipped):
    cfg, vae, codes = shipped
    candidates = pv.load_candidates(cfg, vae, "horse")
    assert torch.equal(candidates.latents, codes["horse_latents"].float())
    assert candidates.images.shape == (3, 3, 64, 64) and candidates.images.dtype == torch.uint8
    assert candidates.crc32 == [5, 6, 7] and not candidates.originals


def test_with_data_the_candidates_are_the_photographs_and_their_codes(pv, cfg):
    vae = pv.VAE(cfg)
    candidates = pv.load_candidates(cfg, vae, "bird")
    assert torch.equal(candidates.images, pv.load_images(cfg, "test", "bird")) and candidates.originals
    assert torch.equal(candidates.latents, pv.encode_mean(vae, candidates.images))
    assert len(set(candidates.crc32)) == len(candidates.images)


def test_codes_of_other_weights_are_refused(pv, shipped):
    cfg, vae, _ = shipped
    with torch.no_grad():
        vae.decoder.to_logits.bias += 1
    with pytest.raises(pv.ReaderError, match="candidates.safetensors belongs to weights"):
        pv.load_candidates(cfg, vae, "horse")


def test_a_missing_class_or_file_of_codes_is_named(pv, shipped):
    cfg, vae, _ = shipped
    with pytest.raises(pv.ReaderError, match="candidates.safetensors cannot be read"):
        pv.load_candidates(cfg, vae, "bird")
    (cfg.checkpoint_dir / "candidates.safetensors").unlink()
    with pytest.raises(pv.ReaderError, match="candidates.safetensors cannot be read"):
        pv.load_candidates(cfg, vae, "horse")
