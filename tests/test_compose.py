"""The spatial layout as the chapter uses it, compositions, their file and the composer without a browser."""

import json
import re

import pytest
import torch
from pydantic import ValidationError

SIDE = 8
HORSES, BIRDS = [1000 + i for i in range(6)], [2000 + i for i in range(6)]  # checksums of the candidates
BLANK, FULL = ("." * SIDE,) * SIDE, ("#" * SIDE,) * SIDE


@pytest.fixture(scope="module")
def vae():
    """A model with two numbers in each cell, in evaluation mode, with batch norms that do something."""
    import pegasus_vae as pv

    torch.manual_seed(0)
    vae = pv.VAE(pv.Config(latent_size=SIDE, latent_dim=2 * SIDE**2, base_channels=8))
    vae(torch.rand(16, 3, 64, 64))
    return vae.eval()


@pytest.fixture(scope="module")
def pictures():
    """Six pictures: a grey ground with a light bar in the upper left quarter."""
    images = torch.full((6, 3, 64, 64), 60, dtype=torch.uint8)
    for number, image in enumerate(images):
        image[:, 16:24, 8 : 24 + number] = 230
    return images


@pytest.fixture
def horse_mu(vae):
    return torch.randn(6, 2 * SIDE**2, generator=torch.Generator().manual_seed(1))


def one_cell(row, column):
    rows = [list(line) for line in BLANK]
    rows[row][column] = "#"
    return tuple("".join(line) for line in rows)


@pytest.mark.parametrize("latent_dim, expected", [(512, 512), (128, 128), (100, 64), (16, 64)])
def test_the_spatial_layout_keeps_as_many_numbers_as_fit_evenly(pv, cfg, latent_dim, expected):
    changed = pv.spatial(cfg.model_copy(update={"latent_dim": latent_dim}))
    assert (changed.latent_size, changed.latent_dim, changed.run_name) == (8, expected, "paper-spatial")
    assert pv.Config(**changed.model_dump()) == changed, "it passes the checks of Config"


@pytest.mark.parametrize("image_size, side", [(32, 4), (64, 8), (96, 12)])
def test_a_cell_of_the_spatial_layout_stands_for_8x8_pixels(pv, cfg, image_size, side):
    changed = pv.spatial(cfg.model_copy(update={"image_size": image_size, "base_channels": 4}))
    vae = pv.VAE(changed)
    logits, mu, _ = vae(torch.zeros(2, 3, image_size, image_size))
    assert vae.decoder.grid[1:] == (side, side) and mu.shape == (2, changed.latent_dim)
    assert logits.shape == (2, 3, image_size, image_size)


def test_cells_are_the_channels_of_one_place(pv):
    z = torch.arange(2 * 3 * 4).float().view(2, 12)  # 3 channels on 2x2 cells
    cells = pv.as_cells(z, (3, 2, 2))
    assert cells.shape == (8, 3) and cells[1].tolist() == [1, 5, 9] and cells[4].tolist() == [12, 16, 20]
    assert torch.equal(pv.as_codes(cells, (3, 2, 2)), z)


def test_shipped_codes_are_found_by_the_layout_of_the_model(pv, cfg, vae, tmp_path):
    no_data = cfg.model_copy(update={"data_dir": tmp_path / "none"})
    with pytest.raises(pv.ReaderError, match="candidates_spatial.safetensors"):
        pv.load_candidates(no_data, vae, "horse")
    with pytest.raises(pv.ReaderError, match="candidates.safetensors"):
        pv.load_candidates(no_data, pv.VAE(cfg), "horse")


def test_only_the_wanted_candidates_are_loaded_in_their_order(pv, cfg, vae):
    everything, some = pv.load_candidates(cfg, vae, "bird"), pv.load_candidates(cfg, vae, "bird", only=[5, 2])
    assert torch.equal(some.images, everything.images[[5, 2]]) and some.crc32 == [everything.crc32[i] for i in (5, 2)]
    assert torch.allclose(some.latents, everything.latents[[5, 2]], atol=1e-5)


def test_an_empty_mask_returns_the_horse_and_a_full_one_the_bird(pv, vae, pictures, horse_mu):
    empty, full = (pv.Composition(bird=0, cells=cells) for cells in (BLANK, FULL))
    assert torch.equal(pv.compose(vae, horse_mu, pictures, [empty] * 6), horse_mu)
    bird_mu = pv.encode_mean(vae, pictures)
    assert torch.allclose(pv.compose(vae, horse_mu, pictures, [full] * 6), bird_mu, atol=1e-5)
    negated = pv.Composition(bird=0, cells=FULL, dark_winged=True)
    assert torch.allclose(pv.compose(vae, horse_mu, pictures, [negated] * 6), -bird_mu, atol=1e-5)


def test_chosen_cells_mix_by_the_weight_neighbours_softly_and_the_rest_stays(pv, vae, pictures, horse_mu):
    composition = pv.Composition(bird=0, cells=one_cell(2, 3), horse_weight=0.25)
    z = pv.compose(vae, horse_mu[:1], pictures[:1], [composition]).unflatten(1, vae.decoder.grid)[0]
    horse = horse_mu[0].unflatten(0, vae.decoder.grid)
    bird = pv.encode_mean(vae, pictures[:1])[0].unflatten(0, vae.decoder.grid)
    share = (z - horse) / (bird - horse)
    for (row, column), expected in {(2, 3): 0.75, (1, 3): 0.75 / 8, (2, 4): 0.75 / 8, (3, 4): 0.75 / 16}.items():
        assert torch.allclose(share[:, row, column], torch.full((2,), expected), atol=1e-3)
    rest = torch.ones(SIDE, SIDE, dtype=torch.bool)
    rest[1:4, 2:5] = False
    assert torch.equal(z[:, rest], horse[:, rest])


def test_each_horse_gets_its_own_composition_whatever_its_neighbours_are(pv, vae, pictures, horse_mu):
    compositions = [pv.Composition(bird=0, cells=one_cell(i, i), right=i / 2, mirror=i % 2 == 0) for i in range(6)]
    together = pv.compose(vae, horse_mu, pictures, compositions)
    alone = [pv.compose(vae, horse_mu[i : i + 1], pictures[i : i + 1], compositions[i : i + 1]) for i in range(6)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-4)


def test_cells_of_another_grid_are_refused(pv, vae, pictures, horse_mu):
    with pytest.raises(ValueError, match="8x8 grid"):
        pv.compose(vae, horse_mu[:1], pictures[:1], [pv.Composition(bird=0, cells=("####",) * 4)])


def place(pv, image, **fields):
    return pv.place_bird(image, pv.Composition(bird=0, cells=BLANK, **fields))


def test_a_bird_that_is_not_changed_stays_as_it_is_and_mirrored_twice_too(pv, pictures):
    image = pictures[3]
    assert torch.equal(place(pv, image), pv.as_float(image))
    once = place(pv, image, mirror=True)
    assert torch.equal(once, pv.as_float(image).flip(2)) and torch.equal(
        place(pv, once, mirror=True), pv.as_float(image)
    )


def test_a_bird_is_moved_by_cells_and_its_background_fills_the_rest(pv, pictures):
    image = pv.as_float(pictures[0])
    moved = place(pv, image, right=2, down=1.5)
    expected = torch.full_like(image, 60 / 255)
    expected[:, 28:36, 24:40] = 230 / 255
    assert torch.allclose(moved, expected)
    assert torch.allclose(place(pv, image, right=-8), torch.full_like(image, 60 / 255)), "moved out of the picture"


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("scale", [0.3, 0.7, 1, 2])
def test_a_bird_can_be_moved_anywhere_and_out_of_the_picture(pv, size, scale):
    image, cells = torch.rand(3, size, size), ("." * (size // 8),) * (size // 8)
    for right in (-8, -3.25, 0, 5, 8):
        for down in (-8, -2, 0.5, 5, 8):
            placed = pv.place_bird(image, pv.Composition(bird=0, cells=cells, scale=scale, right=right, down=down))
            assert placed.shape == image.shape and placed.isfinite().all() and 0 <= placed.min() and placed.max() <= 1


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.5, 2])
def test_a_bird_is_scaled_about_the_middle(pv, scale):
    image = torch.full((3, 64, 64), 0.2)
    image[:, 24:40, 24:40] = 0.9
    size = (place(pv, image, scale=scale)[0] > 0.55).float().sum().sqrt()
    assert abs(size - 16 * scale) < 1.5
    assert place(pv, image, scale=scale)[:, 31:33, 31:33].min() > 0.8


def test_the_cells_of_a_bird_are_those_that_differ_from_its_background(pv, pictures):
    found = pv.bird_cells(pictures[:1], SIDE)[0]
    assert found.nonzero().tolist() == [[2, 1], [2, 2]]
    guess = pv.first_guess(3, pictures[0], SIDE, True)
    assert guess.mask.any() and guess == pv.guessed_cells(guess, pictures[0])
    assert guess.bird == 3 and guess.dark_winged and guess.scale < 1 and guess.down < 0, "smaller, above the middle"


def test_the_difference_of_images_is_taken_where_the_mask_is_set(pv):
    one, other, where = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    other[0, :, 1, 2], other[1, :, 0, 0], where[0, 1, 1:3] = 0.5, 0.9, True
    assert pv.rms_difference(one, other, where) == pytest.approx((0.5**2 / 2) ** 0.5)


BAD_FIELDS = {
    "a letter for a cell": {"cells": ("#x",) * 2},
    "too few rows": {"cells": FULL[:7]},
    "a short row": {"cells": (*FULL[:7], "###")},
    "no cells": {"cells": ()},
    "scale 0": {"scale": 0},
    "a weight above 1": {"horse_weight": 1.5},
    "far away": {"right": 9},
    "not a number": {"down": float("nan")},
    "a negative bird": {"bird": -1},
    "an unknown field": {"colour": "white"},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_composition_is_refused(pv, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        pv.Composition(**{"bird": 0, "cells": BLANK} | fields)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "compositions.json"


@pytest.fixture
def open_file(pv, path, tmp_path):
    """Open the file of compositions, as the notebook does."""

    def open_file(horses=HORSES, birds=BIRDS, side=SIDE):
        return pv.CompositionsFile(path, tmp_path / "shipped.json", {"horse": horses, "bird": birds}, side)

    return open_file


@pytest.fixture
def one(pv):
    return pv.Composition(bird=4, cells=one_cell(1, 2), scale=0.7, right=1.25, mirror=True, good=True)


@pytest.fixture
def two(pv):
    return pv.Composition(bird=0, cells=FULL, dark_winged=True, horse_weight=0.3)


@pytest.fixture
def kept(open_file, one, two):
    """Compositions of horses 3 and 5, on the disk."""
    kept = open_file()
    kept.change(3, one)
    kept.change(5, two)
    return kept


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_compositions_are_read_again_and_can_be_read_by_people(kept, open_file, path, one, two):
    again = open_file()
    assert again.chosen == {3: one, 5: two} and again.origin == "your own" and again.notes == []
    entry = json.loads(path.read_text())["compositions"][0]
    assert (entry["horse"], entry["horse_crc32"], entry["bird"], entry["bird_crc32"]) == (3, 1003, 4, 2004)
    assert entry["cells"] == list(one.cells) and entry["right"] == 1.25


def test_undo_takes_back_the_latest_change_on_the_disk_too(kept, open_file, one):
    kept.undo()
    assert kept[5] is None and open_file().chosen == {3: one}


def test_shipped_compositions_are_used_until_one_is_changed(kept, open_file, path, one, two):
    path.rename(path.with_name("shipped.json"))
    again = open_file()
    assert again.origin == "shipped" and again.chosen == {3: one, 5: two} and not path.exists()
    again.change(3, two)
    assert open_file().chosen == {3: two, 5: two} and open_file().origin == "your own"
    path.unlink()
    assert open_file(horses=HORSES[::-1]).chosen == {}, "those of other pictures are not used"


def test_two_notebooks_keep_each_others_compositions(pv, kept, open_file, one, two):
    other, third = open_file(), one.model_copy(update={"scale": 1.1})
    other.change(0, third)
    kept.change(3, two)
    assert kept.chosen == open_file().chosen == {0: third, 3: two, 5: two}
    other.undo()
    assert open_file().chosen == {3: two, 5: two}


def test_two_notebooks_may_change_different_fields_of_one_composition(kept, open_file, one):
    other = open_file()
    other.change(3, one.model_copy(update={"scale": 1.1, "cells": FULL}))
    kept.change(3, one.model_copy(update={"good": False}))
    assert kept[3] == open_file()[3] == one.model_copy(update={"scale": 1.1, "cells": FULL, "good": False})


def test_what_one_changed_stays_though_the_other_takes_it_back(kept, open_file, two):
    other, changed = open_file(), two.model_copy(update={"scale": 1.1})
    other.change(5, changed)
    kept.undo()  # of the change that made composition 5
    assert open_file()[5] == changed


@pytest.mark.parametrize(
    "horse, fields", [(6, {}), (-1, {}), (True, {}), (0, {"bird": 6}), (0, {"cells": ("##",) * 2})]
)
def test_a_composition_that_fits_nothing_is_refused_and_later_ones_are_saved(
    pv, kept, open_file, one, two, horse, fields
):
    with pytest.raises(pv.ReaderError, match="there is no|do not fit"):
        kept.change(horse, one.model_copy(update=fields))
    kept.change(0, two)
    assert kept.failure is None and open_file().chosen == {0: two, 3: one, 5: two}


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "pegasus_vae compositions", "version": 1}', ""])
def test_a_damaged_file_is_set_aside_and_nothing_is_lost(open_file, path, content):
    path.write_text(content)
    kept = open_file()
    (aside,) = path.parent.glob("compositions.bad-*.json")
    assert kept.chosen == {} and aside.read_text() == content and aside.name in kept.notes[0]


def test_a_file_of_another_version_or_of_other_data_or_of_picks_is_refused_and_left_alone(pv, kept, open_file, path):
    before = path.read_bytes()
    with pytest.raises(pv.ReaderError, match="other data"):
        open_file(birds=BIRDS[::-1])
    assert path.read_bytes() == before
    for change in ({"version": 2}, {"schema": "pegasus_vae picks"}):
        path.write_bytes(before)
        edit(path, **change)
        with pytest.raises(pv.ReaderError, match="pegasus_vae compositions version 1"):
            open_file()
        assert json.loads(path.read_text()) == json.loads(before) | change


BAD_ENTRIES = {
    "no such horse": {"horse": 6},
    "a negative horse": {"horse": -3, "horse_crc32": 1003},
    "a word for a horse": {"horse": "three"},
    "another horse": {"horse_crc32": 1},
    "no such bird": {"bird": 6},
    "another bird": {"bird_crc32": 1},
    "another grid": {"cells": ["####"] * 4},
    "true for a horse": {"horse": True, "horse_crc32": 1001},
    "a horse that comes twice": {"horse": 5, "horse_crc32": 1005},
    "a ragged grid": {"cells": [*FULL[:7], "#"]},
    "out of range": {"scale": 7},
    "an unknown field": {"colour": "white"},
}


@pytest.mark.parametrize("change", [*BAD_ENTRIES.values(), None], ids=[*BAD_ENTRIES, "no composition"])
def test_a_bad_composition_in_the_file_is_dropped_and_reported_and_the_rest_is_kept(kept, open_file, path, two, change):
    first, second = json.loads(path.read_text())["compositions"]
    bad = first | change if change else 7
    edit(path, compositions=[second, bad])
    again = open_file()
    assert again.chosen == {5: two} and len(again.notes) == 1
    assert "dropped" in again.notes[0] and str(bad) in again.notes[0], "all of it can be read in the note"


def test_a_full_disk_keeps_the_old_file_and_the_next_change_saves_both(kept, open_file, path, one, two):
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")
    kept.change(0, one)
    assert "No space left" in kept.failure and kept[0] == one and 0 not in open_file().chosen
    kept.change(1, two)
    assert kept.failure is None and open_file().chosen == kept.chosen == {0: one, 1: two, 3: one, 5: two}


@pytest.fixture
def open_composer(pv, vae, pictures, open_file):
    """open_composer(kept): a composer of horses 3, 1 and 5 with birds 4, 0 and 2."""
    horses = pv.Candidates(pictures[:3], pv.encode_mean(vae, pictures[:3]), [1003, 1001, 1005], True)
    birds = pv.Candidates(pictures[3:], pv.encode_mean(vae, pictures[3:]), [2004, 2000, 2002], True)
    guesses = [pv.first_guess(bird, image, SIDE) for bird, image in zip((4, 0, 2), birds.images)]
    return lambda kept: pv.WingComposer(vae, horses, birds, [3, 1, 5], [4, 0, 2], kept, guesses)


def status(composer):
    return re.sub("<[^>]*>", "", composer.status.value)


def shown(composer):
    """What the widgets say, as fields of a composition."""
    fields = {name: widget.value for name, widget in composer.fields.items()}
    ticks = ["".join("#" if box.value else "." for box in composer.cells[i : i + 8]) for i in range(0, 64, 8)]
    return fields | {"cells": tuple(ticks)}


def test_it_shows_what_is_kept_or_a_guess_and_looking_writes_nothing(kept, open_composer, path, one):
    before = path.read_bytes()
    composer = open_composer(kept)
    assert shown(composer) == one.model_dump() and "horse 1 of 3, #3: composed · your own compositions" in status(
        composer
    )
    for button in ("Next", "Next", "Next", "Previous"):
        composer.buttons[button].click()
    assert "horse 2 of 3, #1: first guess" in status(composer)
    assert shown(composer) == composer.guesses[1].model_dump() and path.read_bytes() == before


def test_every_control_changes_the_file_at_once_and_undo_takes_it_back(kept, open_composer, open_file, one):
    composer = open_composer(kept)
    before = composer.pictures["pegasus"].value
    composer.cells[8 * 5 + 6].set_state({"value": True})  # what the message of a browser does
    assert open_file()[3].mask.nonzero().tolist() == [[1, 2], [5, 6]]
    assert composer.pictures["pegasus"].value != before
    for name, value in {"scale": 1.2, "right": -2, "down": 0.5, "horse_weight": 0.4, "bird": 2}.items():
        composer.fields[name].value = value
        assert getattr(open_file()[3], name) == value
    for name in ("mirror", "dark_winged", "good"):
        composer.fields[name].value = not composer.fields[name].value
        assert getattr(open_file()[3], name) is composer.fields[name].value
    for _ in range(9):
        composer.buttons["Undo"].click()
    assert open_file()[3] == one and shown(composer) == one.model_dump()
    assert composer.pictures["pegasus"].value == before


def test_clear_and_guess_set_the_cells_of_the_bird_as_it_is_placed(pv, kept, open_composer, pictures):
    composer = open_composer(kept)
    composer.buttons["Clear"].click()
    assert not kept[3].mask.any()
    composer.buttons["Guess"].click()
    placed = pv.place_bird(pictures[3], kept[3])[None]  # bird 4
    assert torch.equal(kept[3].mask, pv.bird_cells(placed, SIDE)[0]) and kept[3].mask.any()


def test_the_next_horse_keeps_its_own(kept, open_composer, open_file, one):
    composer = open_composer(kept)
    composer.buttons["Next"].click()
    composer.fields["mirror"].value = True
    assert open_file()[3] == one and open_file()[1].mirror and open_file()[1].bird == 0


def test_a_bird_that_is_not_at_hand_is_named_and_nothing_is_lost(kept, open_composer, one):
    composer = open_composer(kept)
    kept.change(3, one.model_copy(update={"bird": 1}))
    assert "bird" in status(composer) and "run the cell above" in status(composer) and kept[3].bird == 1


def test_an_older_composer_is_closed(kept, open_composer):
    old = open_composer(kept)
    new = open_composer(kept)
    assert old.comm is None and all(box.comm is None for box in old.cells) and new.comm is not None


def test_the_pictures_are_those_of_the_horse_that_is_shown(pv, vae, pictures, kept, open_composer):
    composer = open_composer(kept)
    composer.buttons["Next"].click()
    guess = composer.guesses[1]
    bird = composer.birds.images[1]
    z = pv.compose(vae, composer.horses.latents[1:2], [bird], [guess])
    expected = {"horse": pictures[1], "bird": pv.place_bird(bird, guess), "pegasus": pv.decode_images(vae, z)[0]}
    for name, image in expected.items():
        assert composer.pictures[name].value == pv.jpeg((pv.as_float(image) * 255).round().byte(), 256), name


def test_undo_shows_the_horse_whose_change_was_taken_back(kept, open_composer, two):
    composer = open_composer(kept)
    composer.buttons["Next"].click()
    composer.buttons["Undo"].click()  # of horse 5
    assert kept[5] is None and composer.horse == 5


def test_a_horse_that_cannot_be_shown_does_not_take_the_clicks(kept, open_composer, one, two):
    composer = open_composer(kept)
    kept.change(1, one.model_copy(update={"bird": 3}))
    composer.buttons["Next"].click()
    assert "bird #3 is new here" in status(composer) and composer.horse == 3
    composer.fields["mirror"].value = False
    assert not kept[3].mirror and kept[1].mirror and "is new here" not in status(composer)


def test_no_widget_of_an_older_composer_is_left(kept, open_composer):
    from ipywidgets.widgets.widget import _instances

    open_composer(kept)
    count = len(_instances)
    open_composer(kept)
    assert len(_instances) == count
