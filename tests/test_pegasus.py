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


def test_animals_are_most_alike_in_the_direction_of_their_codes_not_in_length(pv):
    latents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 1.0], [-1.0, 0.0]])
    assert pv.most_like(latents, [0]) == [0, 2, 1, 3]
    assert pv.most_like(latents, [0, 3]) == pv.most_like(latents, []) == [0, 1, 2, 3], "no direction, no order"


def test_contrast_is_zero_for_plain_images_and_half_for_half_black_half_white(pv):
    plain, half = paint_all(RED) / 255, paint((0, 0, 32, 64, WHITE)) / 255
    assert pv.contrast(plain) == pytest.approx(0, abs=1e-6) and pv.contrast(half) == pytest.approx(0.5, abs=1e-3)
    assert pv.contrast(torch.cat([plain, half])) == pytest.approx(0.25, abs=1e-3)


def test_diversity_is_zero_for_equal_images_and_one_between_black_and_white(pv):
    red, black, white = (paint_all(colour) / 255 for colour in (RED, BLACK, WHITE))
    assert pv.diversity(red.expand(5, -1, -1, -1)) == 0
    assert pv.diversity(torch.cat([black, white])) == pytest.approx(1)
    assert pv.diversity(torch.cat([black, black, white])) == pytest.approx(2 / 3)


def test_nearest_gives_the_index_and_the_rms_distance_of_the_one_that_is_nearest(pv):
    pool = torch.tensor([0.0, 0.3, 0.9, 0.35])[:, None, None, None].expand(-1, 3, 8, 8)
    index, distance = pv.nearest(torch.tensor([0.8, 0.34])[:, None, None, None].expand(-1, 3, 8, 8), pool)
    assert index.tolist() == [2, 3] and distance.tolist() == pytest.approx([0.1, 0.01], abs=1e-5)


def test_nearest_looks_through_the_whole_of_a_large_pool_of_bytes_and_finds_mirror_images(pv):
    torch.manual_seed(0)
    pool = torch.randint(256, (2050, 3, 8, 8), dtype=torch.uint8)
    for queries in (pool[[7, 2049, 2047]], pool[[7, 2049, 2047]].flip(3)):
        index, distance = pv.nearest(queries, pool)
        assert index.tolist() == [7, 2049, 2047] and distance.tolist() == pytest.approx([0, 0, 0], abs=1e-3)


@pytest.fixture
def figures(pv, monkeypatch):
    """What is drawn instead of shown: a list of (axes, whether it replaces the figure before)."""
    figures = []
    monkeypatch.setattr(pv, "show_figure", lambda path, figure, alt, update: figures.append((figure.axes[0], update)))
    yield figures
    pv.plt.close("all")


def colours_in(axes, rows, columns, height, width):
    """The colours in the middle of the pictures of a figure, (rows, columns, 3), in tenths."""
    drawn = torch.as_tensor(axes.images[0].get_array())
    assert drawn.shape == (2 + rows * (height + 2), 2 + columns * (width + 2), 3)
    middle = drawn[2 + height // 2 :: height + 2, 2 + width // 2 :: width + 2]
    return (10 * middle).round().int().tolist()


def labels_of(ticks):
    return [tick.get_text() for tick in ticks]


def test_rows_of_pictures_stand_upright_and_in_order_beside_their_labels(pv, figures, tmp_path):
    tenths = torch.arange(9).view(3, 3, 1, 1).expand(-1, -1, 8, 16) / 10  # picture i is (3i, 3i + 1, 3i + 2)
    rows = {"floats": tenths, "bytes": (255 * tenths[1:2]).round().byte()}
    pv.show_rows(tmp_path / "rows.png", rows, "A title", "two rows", ["a", "b", "c"], update=True)
    ((axes, update),) = figures
    white = [10, 10, 10]
    assert colours_in(axes, 2, 3, 8, 16) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]], [[3, 4, 5], white, white]]
    assert labels_of(axes.get_yticklabels()) == ["floats", "bytes"] and axes.get_yticks()[0] < axes.get_yticks()[1]
    assert labels_of(axes.get_xticklabels()) == ["a", "b", "c"] and axes.get_title() == "A title" and update


def test_the_numbers_at_a_contact_sheet_add_up_to_that_of_the_picture(pv, figures, tmp_path):
    images = torch.arange(8).view(8, 1, 1, 1).expand(-1, 3, 8, 16) / 10
    pv.contact_sheet(tmp_path / "sheet.png", images, "A title", "eight pictures", columns=3)
    ((axes, update),) = figures
    rows, columns = (labels_of(ticks) for ticks in (axes.get_yticklabels(), axes.get_xticklabels()))
    numbers = [[int(row.removesuffix(" +")) + int(column) for column in columns] for row in rows]
    assert numbers == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and not update
    assert [[grey[0] for grey in row] for row in colours_in(axes, 3, 3, 8, 16)] == [[0, 1, 2], [3, 4, 5], [6, 7, 10]]
    pv.contact_sheet(tmp_path / "sheet.png", images[:2], "A title", "two pictures", columns=3)
    assert labels_of(figures[1][0].get_xticklabels()) == ["0", "1"]


def test_a_batch_takes_the_place_of_a_larger_one(pv, tmp_path):
    for count in (5, 3):
        pv.save_batch(tmp_path / "batch", torch.rand(count, 3, 8, 8))
    assert sorted(file.name for file in (tmp_path / "batch").iterdir()) == ["00.png", "01.png", "02.png"]


def test_a_decoder_that_swaps_light_and_dark_correlates_by_minus_one_and_a_blind_one_by_one(pv, monkeypatch):
    torch.manual_seed(0)
    weight, z = torch.randn(5, 12), torch.randn(4, 5)
    for draw, expected in {
        (lambda z: 0.5 + z @ weight): -1,  # linear, about a grey average
        (lambda z: 0.5 + (z @ weight).square()): 1,  # the sign makes no difference
        (lambda z: 0.5 + z @ weight + 9 * z.norm(dim=1)[:, None]): -1,  # so brighter over all is no matter
    }.items():
        monkeypatch.setattr(pv, "decode_images", lambda vae, z, draw=draw: draw(z).unflatten(1, (3, 2, 2)))
        assert pv.negation_correlation(None, z).tolist() == pytest.approx([expected] * 4, abs=1e-4)


def test_a_decoder_that_fades_is_not_beyond_fading_and_another_by_its_share(pv, monkeypatch):
    torch.manual_seed(0)
    weight, horse, bird = torch.randn(5, 12), torch.randn(4, 5), torch.randn(4, 5)
    monkeypatch.setattr(pv, "decode_images", lambda vae, z: (z @ weight).unflatten(1, (3, 2, 2)))
    assert pv.beyond_fading(None, horse, bird, 0.6) == pytest.approx(0, abs=1e-6)
    parents = {0.0: 0.0, 1.0: 1.0, 0.6: 0.7}  # the code in between draws a tenth more than the cross-fade
    monkeypatch.setattr(pv, "decode_images", lambda vae, z: torch.full((1, 3, 2, 2), parents[round(z.item(), 3)]))
    assert pv.beyond_fading(None, torch.ones(1, 1), torch.zeros(1, 1), 0.6) == pytest.approx(0.1)


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


# the code with places


@pytest.fixture(scope="module")
def grid_vae():
    """A model with two numbers in each of 16x16 cells, in evaluation mode, with batch norms that do something."""
    import pegasus_vae as pv

    torch.manual_seed(0)
    vae = pv.VAE(pv.Config(latent_size=16, latent_dim=512, base_channels=4))
    vae(torch.rand(16, 3, 64, 64))
    return vae.eval()


def test_shipped_codes_are_found_by_the_layout_of_the_model(pv, cfg, grid_vae, tmp_path):
    no_data = cfg.model_copy(update={"data_dir": tmp_path / "none"})
    with pytest.raises(pv.ReaderError, match="candidates_spatial.safetensors"):
        pv.load_candidates(no_data, grid_vae, "horse")


def place(pv, image, **fields):
    return pv.place_bird(image, pv.Composition(bird=0, **fields))


def bar(left, top, right, bottom):
    """A light box on a grey ground, floats (3, 64, 64)."""
    return paint((0, 0, 64, 64, (60, 60, 60)), (left, top, right, bottom, (230, 230, 230)))[0] / 255


def test_a_bird_that_is_not_changed_stays_as_it_is_and_bytes_become_floats(pv):
    image = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(place(pv, image), image / 255, atol=1e-5)


def test_a_mirrored_bird_faces_the_other_way_and_then_moves(pv):
    image = bar(8, 16, 24, 24)
    assert torch.allclose(place(pv, image, mirror=True), bar(40, 16, 56, 24), atol=1e-5)
    assert torch.allclose(place(pv, image, mirror=True, right=1), bar(48, 16, 64, 24), atol=1e-5)


def test_a_bird_is_moved_by_eighths_and_its_background_fills_the_rest(pv):
    image = bar(8, 16, 24, 24)
    assert torch.allclose(place(pv, image, right=2, down=1.5), bar(24, 28, 40, 36), atol=1e-5)
    assert torch.allclose(place(pv, image, right=-8), bar(0, 0, 0, 0), atol=1e-5), "moved out of the picture"
    assert torch.allclose(place(pv, image[:, :, :32], down=-2), bar(8, 0, 24, 8)[:, :, :32], atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.5, 2])
def test_a_bird_is_scaled_about_the_middle(pv, scale):
    placed = place(pv, bar(24, 24, 40, 40), scale=scale)
    assert (placed[0] > 0.55).float().sum().sqrt() == pytest.approx(16 * scale, abs=1.5)
    assert placed[:, 31:33, 31:33].min() > 0.8 and place(pv, placed, scale=1)[0, 0, 0] == pytest.approx(60 / 255)


def test_a_bird_is_turned_clockwise_about_the_middle(pv):
    image = bar(8, 28, 24, 36)  # left of the middle
    assert torch.allclose(place(pv, image, turn=90), bar(28, 8, 36, 24), atol=1e-4), "above it"
    assert torch.allclose(place(pv, image, turn=-90), bar(28, 40, 36, 56), atol=1e-4), "below it"
    assert torch.allclose(place(pv, image, turn=180), bar(40, 28, 56, 36), atol=1e-4)
    assert torch.allclose(place(pv, image, turn=90, right=3), bar(52, 8, 60, 24), atol=1e-4), "turned, then moved"


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize(
    "fields", [{"scale": 2, "turn": 45}, {"scale": 0.3, "down": -8}, {"right": -3.25, "turn": -100}]
)
def test_whatever_is_done_to_a_bird_it_stays_a_picture(pv, size, fields):
    placed = place(pv, torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)), **fields)
    assert placed.shape == (3, size, size) and placed.isfinite().all() and 0 <= placed.min() <= placed.max() <= 1


def test_the_cover_of_a_cell_is_the_share_that_is_not_background(pv):
    cover = pv.bird_cover(torch.stack([bar(8, 16, 22, 24), bar(0, 0, 0, 0)]), 8)
    assert cover.shape == (2, 1, 8, 8) and not cover[1].any()
    full, part = cover[0, 0, 2, 1:3].tolist()
    assert full == pytest.approx(1) and part == pytest.approx(6 / 8) and (cover[0] > 0).sum() == 2
    faint = bar(8, 16, 24, 24).clamp(max=60 / 255 + 0.135)  # halfway between nothing and all
    assert pv.bird_cover(faint[None], 8)[0, 0, 2, 1] == pytest.approx(0.5, abs=1e-3)


def test_guessed_cells_are_those_that_the_placed_bird_fills_by_a_third(pv):
    image = bar(8, 16, 27, 24)  # two blocks and three eighths of a third
    guess = pv.guess_cells(pv.Composition(bird=3, good=True), image)
    assert guess.mask.nonzero().tolist() == [[2, 1], [2, 2], [2, 3]] and guess.bird == 3 and guess.good
    moved = pv.guess_cells(guess.model_copy(update={"down": 2, "mirror": True}), image)
    assert moved.mask.nonzero().tolist() == [[4, 4], [4, 5], [4, 6]]
    assert not pv.guess_cells(guess, bar(8, 16, 10, 24)).mask.any()


FULL, EMPTY = ("########",) * 8, ("........",) * 8
BLOCK = EMPTY[:3] + ("..##....", "..##....") + EMPTY[:3]


@pytest.fixture
def horse_mu():
    return torch.randn(3, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def confetti():
    """A picture whose every pixel differs from its background: red, green and blue points, whose median is black."""
    points = torch.randint(3, (64, 64), generator=torch.Generator().manual_seed(2))
    return torch.nn.functional.one_hot(points, 3).permute(2, 0, 1).float()


def compose_one(pv, vae, horse_mu, image, **fields):
    """The code of one horse and one bird on its grid, (2, 16, 16)."""
    z = pv.compose(vae, horse_mu[:1], image[None], [pv.Composition(bird=0, **fields)])
    return z[0].unflatten(0, vae.decoder.grid)


def test_no_chosen_blocks_return_the_horse(pv, grid_vae, horse_mu, confetti):
    z = pv.compose(grid_vae, horse_mu, confetti.expand(3, -1, -1, -1), [pv.Composition(bird=0)] * 3)
    assert torch.equal(z, horse_mu)


@pytest.mark.parametrize("dark_winged, sign", [(False, 1), (True, -1)])
def test_all_blocks_of_a_bird_that_covers_them_return_the_bird_or_its_negative(
    pv, grid_vae, horse_mu, confetti, dark_winged, sign
):
    z = compose_one(pv, grid_vae, horse_mu, confetti, cells=FULL, dark_winged=dark_winged)
    assert torch.allclose(z.flatten(), sign * pv.encode_mean(grid_vae, confetti[None])[0], atol=1e-4)


def test_blocks_in_which_no_bird_is_seen_stay_the_horses(pv, grid_vae, horse_mu):
    z = compose_one(pv, grid_vae, horse_mu, bar(8, 16, 24, 24), cells=FULL)
    changed = (z != horse_mu[0].view(2, 16, 16)).all(dim=0).nonzero().tolist()
    assert changed == [[row, column] for row in (4, 5) for column in (2, 3, 4, 5)]


@pytest.mark.parametrize("side", [4, 12, 16, 64])
def test_cells_hold_the_share_of_them_that_is_chosen(pv, side):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2, 5] = mask[3, 6] = True
    shares = pv.chosen_blocks([mask], side)
    assert shares.shape == (1, 1, side, side) and shares.mean().item() == pytest.approx(2 / 64)
    if side % 8 == 0:
        assert torch.equal(shares[0, 0], mask.float().repeat_interleave(side // 8, 0).repeat_interleave(side // 8, 1))


def test_chosen_blocks_are_soft_at_their_border_and_far_ones_stay(pv, grid_vae, horse_mu, confetti):
    z = compose_one(pv, grid_vae, horse_mu, confetti, cells=BLOCK)  # cells 6 to 9, 4 to 7 of the grid
    horse = horse_mu[0].view(2, 16, 16)
    bird = pv.encode_mean(grid_vae, confetti[None])[0].view(2, 16, 16)
    share = ((z - horse) / (bird - horse)).median(dim=0).values
    expected = {(7, 5): 1, (6, 5): 2 / 3, (6, 4): 4 / 9, (5, 5): 1 / 3, (5, 4): 2 / 9, (5, 3): 1 / 9}
    for place, value in expected.items():
        assert share[place] == pytest.approx(value, abs=1e-2), place
    assert torch.equal(z[:, :5], horse[:, :5]) and torch.equal(z[:, 11:], horse[:, 11:])
    assert torch.equal(z[:, :, :3], horse[:, :, :3]) and torch.equal(z[:, :, 9:], horse[:, :, 9:])


@pytest.mark.parametrize("tint", [0, 0.5])
@pytest.mark.parametrize("dark_winged, sign", [(False, 1), (True, -1)])
def test_a_cell_is_composed_by_the_formula(pv, grid_vae, horse_mu, dark_winged, sign, tint):
    image = bar(10, 17, 30, 30)
    fields = {"cells": FULL, "scale": 0.9, "turn": 20, "right": 1, "dark_winged": dark_winged, "tint": tint}
    z = compose_one(pv, grid_vae, horse_mu, image, **fields)
    placed = pv.place_bird(image, pv.Composition(bird=0, **fields))[None]
    bird = pv.encode_mean(grid_vae, placed)[0].view(2, 16, 16)
    sky = pv.encode_mean(grid_vae, torch.full_like(placed, 60 / 255))[0].view(2, 16, 16)
    horse, cover = horse_mu[0].view(2, 16, 16), pv.bird_cover(placed, 16)[0, 0]
    weight = cover * (cover > 0.05)
    colour = horse[:, 14:].mean(dim=(1, 2)) - sign * (weight * bird).sum(dim=(1, 2)) / weight.sum()
    partly = 0
    for row in range(16):
        for column in range(16):
            h, b, s, k = horse[:, row, column], bird[:, row, column], sky[:, row, column], cover[row, column]
            m = float(k > 0.05)
            expected = h + m * ((sign * b + tint * k * colour - sign * s) + k * (sign * s - h))
            assert torch.allclose(z[:, row, column], expected, atol=1e-4), (row, column)
            partly += bool(0.05 < k < 0.95)
    assert partly > 5


@pytest.mark.parametrize("tint", [0.25, 1])
def test_a_tint_moves_the_mean_of_the_wing_towards_that_of_the_horses_back(pv, grid_vae, horse_mu, confetti, tint):
    plain, tinted = (compose_one(pv, grid_vae, horse_mu, confetti, cells=BLOCK, tint=t) for t in (0, tint))
    share = torch.zeros(1, 1, 16, 16)
    share[:, :, 6:10, 4:8] = 1
    share = torch.nn.functional.avg_pool2d(share, 3, stride=1, padding=1)[0]
    bird = pv.encode_mean(grid_vae, confetti[None])[0].view(2, 16, 16)
    wing = (share * bird).sum(dim=(1, 2)) / share.sum()
    back = horse_mu[0].view(2, 16, 16)[:, 10:12, 4:8].mean(dim=(1, 2))  # below the chosen blocks
    assert torch.allclose(tinted - plain, tint * share * (back - wing)[:, None, None], atol=1e-3)
    assert (back - wing).abs().min() > 0.05, "or the test says nothing"


@pytest.mark.parametrize(
    "cells, back",
    [
        (EMPTY, []),
        (BLOCK, [[5, 2], [5, 3]]),
        (("#.......", "....#..#") + EMPTY[2:], [[2, 4], [2, 7]]),
        (EMPTY[:7] + ("#.......",), [[7, 0]]),  # there is nothing below the last row
    ],
)
def test_the_back_is_below_the_lowest_chosen_blocks(pv, cells, back):
    assert pv.Composition(bird=0, cells=cells).back.nonzero().tolist() == back


def test_each_horse_gets_its_own_composition_whatever_its_neighbours_are(pv, grid_vae, horse_mu, confetti):
    images = torch.stack([confetti, bar(8, 16, 24, 24), bar(30, 10, 60, 40)])
    compositions = [
        pv.Composition(bird=0, cells=BLOCK, turn=30, tint=0.5),
        pv.Composition(bird=0, cells=FULL, dark_winged=True),
        pv.Composition(bird=0, cells=FULL, mirror=True, right=-2),
    ]
    together = pv.compose(grid_vae, horse_mu, images, compositions)
    alone = [pv.compose(grid_vae, horse_mu[i : i + 1], images[i : i + 1], compositions[i : i + 1]) for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)
