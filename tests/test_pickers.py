"""The pickers and the wing composer, without a browser: what a click does, and what is shown."""

import html
import inspect
import io
import itertools
import json
import re

import pytest
import torch
import tqdm.notebook
from PIL import Image

SIDE = 16  # cells of the latent grid
WING = ("########",) * 5 + ("........",) * 3


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so none needs to wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picks.json"


@pytest.fixture
def open_picks(pv, path):
    """Open the file of choices, as the notebook does when it is started; shipped: the choices to start from."""

    def open_picks(count=12, shipped=None):
        candidates = {group: [start + i for i in range(count)] for group, start in (("horse", 1000), ("bird", 2000))}
        return pv.PicksFile(path, shipped or path.with_name("none"), candidates, 4, "test")

    return open_picks


@pytest.fixture
def picks(pv, open_picks, path):
    """Three horses, two birds of which one has dark wings, a best pegasus and a composition; all on the disk."""
    choices = pv.Choices(data=open_picks().data, horse=[7, 2, 9], bird=[5, 3], dark=[5])
    choices.compositions[7] = pv.Composition(bird=5, cells=WING, scale=0.7, right=1.25, mirror=True)
    path.write_text(choices.model_dump_json())
    choices.best = {open_picks().batch: [1]}
    path.write_text(choices.model_dump_json())
    return open_picks()


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def open_picker(pv, images):
    """open_picker(picks, group): a picker of twelve pictures, five a page."""
    sorts = {"file order": list(range(12)), "backwards": list(range(11, -1, -1))}
    options = {"picture": images.__getitem__, "sorts": sorts, "per_page": 5}
    return lambda picks, group, **more: pv.ImagePicker(picks=picks, group=group, **options | more)


def shown(picker):
    """Numbers of the pictures on the page."""
    numbers = {cell: index for index, cell in picker.cells.items()}
    return [numbers[cell] for cell in picker.grid.children]


def ticked(picker):
    """Numbers of the pictures on the page whose checkbox is ticked."""
    return [index for index in shown(picker) if picker.boxes[index].value]


def click(box, value=True):
    """What the message of a browser does when a checkbox is clicked."""
    box.set_state({"value": value})


def status(controls):
    """The status line as it is read."""
    return html.unescape(re.sub("<[^>]*>", "", controls.status.value))


def widget_count(pv):
    """How many widgets there are in the kernel."""
    return len(pv.widgets.Widget.get_manager_state()["state"])


def fill_the_disk(path):
    """The next write of the file ends on the device that is always full."""
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")


@pytest.mark.parametrize("group, index, before", [("horse", 4, [2]), ("bird", 4, [3]), ("best", 3, [1])])
def test_a_click_picks_at_once_a_second_unpicks_and_undo_takes_back(
    picks, open_picks, open_picker, group, index, before
):
    picker = open_picker(picks, group)
    assert ticked(picker) == before
    click(picker.boxes[index])
    assert open_picks().choices == picks.choices and index in picks[group]
    click(picker.boxes[index], False)
    assert open_picks().choices == picks.choices and index not in picks[group] and ticked(picker) == before
    picker.buttons["Undo"].click()
    assert index in open_picks()[group] and index in ticked(picker)


def test_pages_turn_and_stop_at_both_ends(picks, open_picker):
    picker = open_picker(picks, "bird")
    pages = [shown(picker)]
    for button in ("Next", "Next", "Next", "Previous", "Previous", "Previous"):
        picker.buttons[button].click()
        pages.append(shown(picker))
    first, second, third = [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]
    assert pages == [first, second, third, third, second, first, first]


def test_a_click_that_crosses_with_a_page_turn_marks_the_picture_that_was_seen(picks, open_picker):
    picker = open_picker(picks, "bird")
    seen = picker.boxes[0]
    picker.buttons["Next"].click()
    click(seen)
    assert picks["bird"] == [5, 3, 0] and ticked(picker) == [5]
    picker.buttons["Previous"].click()
    assert ticked(picker) == [0, 3]


def test_another_order_starts_on_its_first_page(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.buttons["Next"].click()
    picker.sort.label = "backwards"
    assert shown(picker) == [11, 10, 9, 8, 7]


def test_an_order_may_depend_on_the_picks_and_holds_until_it_is_chosen_again(picks, open_picker):
    sorts = {"file order": range(12), "picks first": lambda picked: picked + [i for i in range(12) if i not in picked]}
    picker = open_picker(picks, "bird", sorts=sorts)
    picker.sort.label = "picks first"
    assert shown(picker) == [5, 3, 0, 1, 2]
    click(picker.boxes[2])
    assert shown(picker) == [5, 3, 0, 1, 2], "pictures do not move under the reader's hand"
    picker.sort.label = "file order"
    picker.sort.label = "picks first"
    assert shown(picker) == [5, 3, 2, 0, 1]


def test_the_filter_shows_picked_or_unpicked_pictures_only(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.show.value = "picked"
    assert shown(picker) == [3, 5]
    picker.show.value = "not picked"
    assert shown(picker) == [0, 1, 2, 4, 6]
    click(picker.boxes[0])
    assert 0 not in shown(picker)
    picker.show.value = "all"
    assert shown(picker) == [0, 1, 2, 3, 4] and ticked(picker) == [0, 3]


def test_suggest_fills_up_from_the_chosen_order_and_undo_takes_it_back(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.sort.label = "backwards"
    picker.buttons["Suggest"].click()
    assert picks["bird"] == [5, 3, 11, 10] and ticked(picker) == [11, 10]
    assert "4 of 4 birds picked" in status(picker)
    picker.buttons["Undo"].click()
    assert picks["bird"] == [5, 3] and ticked(picker) == []


@pytest.mark.parametrize("group", ["dark", "best"])
def test_marks_and_best_cannot_be_suggested(picks, open_picker, group):
    assert "Suggest" not in open_picker(picks, group).buttons


def test_the_dark_picker_shows_the_picked_birds_as_they_are_now(picks, open_picker):
    birds, dark = open_picker(picks, "bird"), open_picker(picks, "dark")
    assert shown(dark) == [3, 5] and ticked(dark) == [5] and "1 marked as dark-winged" in status(dark)
    click(birds.boxes[1])
    assert shown(dark) == [1, 3, 5]
    click(dark.boxes[1])
    assert picks["dark"] == [5, 1] and "2 marked as dark-winged" in status(dark)
    click(birds.boxes[1], False)
    assert shown(dark) == [3, 5] and picks["dark"] == [5]


def test_an_emptied_page_of_the_dark_picker_gives_way_to_the_one_before(picks, open_picker):
    dark = open_picker(picks, "dark", per_page=1)
    dark.buttons["Next"].click()
    assert shown(dark) == [5]
    picks.change("bird", 5, False)
    assert shown(dark) == [3] and "page 1 of 1" in status(dark)


def test_a_bird_that_another_notebook_has_unpicked_cannot_be_marked(picks, open_picks, open_picker):
    dark = open_picker(picks, "dark")
    open_picks().change("bird", 3, False)
    click(dark.boxes[3])
    assert picks["dark"] == [5] == ticked(dark) == shown(dark)


def test_the_page_is_not_told_that_a_click_was_undone_while_it_is_carried_out(
    picks, open_picks, open_picker, monkeypatch
):
    """Its value in passing would stay on the page: ipywidgets does not send what the page itself has said."""
    picker, sent = open_picker(picks, "bird"), []
    for index in (0, 4):  # what is sent are the names of traits: one, or a set that may be empty
        box = picker.boxes[index]
        monkeypatch.setattr(box, "send_state", lambda key=None, index=index: sent.append((index, key)) if key else None)
    open_picks().change("bird", 4, True)
    click(picker.boxes[0])
    assert ticked(picker) == [0, 3, 4] and sent == [(4, "value")]


def test_a_click_shows_what_another_notebook_has_changed_meanwhile(picks, open_picks, open_picker):
    picker, other = open_picker(picks, "bird"), open_picks()
    other.change("bird", 3, False)
    other.change("bird", 4, True)
    click(picker.boxes[0])
    assert ticked(picker) == [0, 4] and "3 of 4 birds" in status(picker)
    assert picks["bird"] == open_picks()["bird"] == [5, 4, 0]
    other.change("bird", 1, True)
    click(picker.boxes[1])
    assert ticked(picker) == [0, 1, 4] and "4 of 4 birds" in status(picker)


def test_a_fourth_best_unticks_the_first(picks, open_picker):
    picker = open_picker(picks, "best", per_page=12, sorts={"as in the batch": range(4)})
    for position in (3, 2):
        click(picker.boxes[position])
    assert ticked(picker) == [1, 2, 3] and "3 of 3 best pegasi picked" in status(picker)
    click(picker.boxes[0])
    assert ticked(picker) == [0, 2, 3] and picks["best"] == [3, 2, 0]


def test_listeners_follow_every_change_and_what_one_cannot_do_is_said(picks, open_picker):
    picker, seen = open_picker(picks, "best"), []

    def follow():
        seen.append(picks["best"])
        if len(seen) > 1:
            raise OSError(28, "No space left on device")

    picks.listeners["follower"] = lambda: picker.attempt(follow)
    click(picker.boxes[3])
    assert seen == [[1, 3]] and "No space" not in status(picker)
    picker.buttons["Undo"].click()
    assert seen == [[1, 3], [1]] and "No space left on device" in status(picker) and ticked(picker) == [1]


def test_the_status_counts_and_says_where_one_is_and_whose_it_is(picks, open_picks, open_picker, path):
    picker = open_picker(picks, "bird")
    assert status(picker) == "2 of 4 birds picked · page 1 of 3 · your own choices, saved"
    picker.buttons["Next"].click()
    assert "page 2 of 3" in status(picker)
    picks.fill("bird", range(4))
    for bird in (6, 7):
        click(picker.boxes[bird])
    assert "6 of 4 birds picked: remove 2" in status(picker)
    assert 'role="status" aria-live="polite"' in picker.status.value
    path.unlink()
    nobodys = open_picks()
    assert "0 of 4 horses picked · page 1 of 3 · nothing chosen yet" == status(open_picker(nobodys, "horse"))
    nobodys.fill("horse", range(12), save=False)
    assert "suggested choices" in status(open_picker(nobodys, "horse"))


def test_shipped_choices_are_called_so_until_a_click(picks, open_picks, open_picker, path, tmp_path):
    picker = open_picker(open_picks(shipped=path.rename(tmp_path / "shipped.json")), "horse")
    assert "shipped choices" in status(picker)
    click(picker.boxes[0])
    assert "your own choices, saved" in status(picker)


def test_a_full_disk_is_said_and_a_later_click_saves_everything(picks, open_picks, open_picker, path):
    picker = open_picker(picks, "horse")
    fill_the_disk(path)
    click(picker.boxes[0])
    assert ticked(picker) == [0, 2] and "<strong>NOT saved</strong>" in picker.status.value
    assert "NOT saved: " in status(picker) and "No space left" in status(picker)
    click(picker.boxes[1])
    assert "NOT saved" not in status(picker) and open_picks()["horse"] == [7, 2, 9, 0, 1]


def test_the_status_line_says_that_a_file_was_set_aside(picks, open_picks, open_picker, path):
    path.write_text("{")
    assert "picks.bad-" in status(open_picker(open_picks(), "horse"))


def test_what_a_file_says_cannot_become_part_of_the_page(picks, open_picker, path):
    picker = open_picker(picks, "horse")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": "<img src=x onerror=alert(1)>"}))
    click(picker.boxes[0])
    assert "<img" not in picker.status.value and "(<img src=x onerror=alert(1)>)" in status(picker)


def test_what_goes_wrong_in_a_click_is_shown_and_ends_nothing(picks, open_picks, open_picker, images):
    def picture(index):
        if index == 7:
            raise RuntimeError("out of memory <here>")
        return images[index]

    picker = open_picker(picks, "bird", picture=picture)
    picker.buttons["Next"].click()
    assert shown(picker) == [0, 1, 2, 3, 4] and "page 1 of 3" in status(picker)
    assert "RuntimeError: out of memory <here>" in status(picker)
    click(picker.boxes[4])
    assert open_picks()["bird"] == [5, 3, 4] and "RuntimeError" not in status(picker)


def test_every_picture_is_a_jpeg_labelled_with_its_number(pv, picks, open_picker, images):
    picker = open_picker(picks, "horse")
    picture, box = picker.cells[2].children
    assert box is picker.boxes[2] and box.description == "#2"
    assert picture.format == "jpeg" and picture.value == pv.jpeg(images[2])


def test_wide_pictures_keep_their_shape_and_their_colours(pv):
    wide = Image.open(
        io.BytesIO(pv.jpeg(torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(3, 64, 128)))
    )
    assert wide.format == "JPEG" and wide.size == (192, 96)
    assert wide.getpixel((100, 50)) == pytest.approx((200, 100, 50), abs=3)


def test_thousands_of_candidates_cost_no_more_than_a_page_and_no_picture_is_made_twice(pv, open_picks, images):
    many, looked_at = range(1339), []
    picture = lambda index: looked_at.append(index) or images[0]  # noqa: E731
    picker = pv.ImagePicker(picture, open_picks(1339), "bird", {"file order": many})
    assert looked_at == list(many[:40]) and "page 1 of 34" in status(picker)
    for button in ("Next", "Next", "Previous", "Previous", "Next"):
        picker.buttons[button].click()
    assert shown(picker) == list(many[40:80]) and looked_at == list(many[:120])


def test_a_newer_picker_of_a_group_takes_the_place_of_the_older_and_leaves_no_widgets(pv, picks, open_picker):
    older = open_picker(picks, "horse")
    older.buttons["Next"].click()
    count = widget_count(pv)
    newer = open_picker(picks, "horse")
    newer.buttons["Next"].click()
    picks.change("horse", 0, True)
    newer.buttons["Previous"].click()
    assert ticked(newer) == [0, 2] and widget_count(pv) == count
    assert older.comm is None and all(box.comm is None for box in older.boxes.values())


def test_a_bird_stands_on_the_left_of_what_its_negative_decodes_to(pv, cfg):
    torch.manual_seed(0)
    vae, latents = pv.VAE(cfg), torch.randn(3, cfg.latent_dim)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    pair = pv.beside_negative(vae, pv.Candidates(images, latents, [0, 1, 2], True), 2)
    assert pair.shape == (3, 64, 128) and torch.equal(pair[:, :, :64], images[2])
    assert (pair[:, :, 64:].float() - pv.decode_images(vae, -latents)[2] * 255).abs().max() < 2


def test_the_best_is_written_four_times_enlarged(pv, tmp_path):
    pv.save_large(tmp_path / "best.png", torch.full((3, 64, 64), 0.3))
    with Image.open(tmp_path / "best.png") as best:
        assert best.size == (256, 256) and abs(best.getpixel((128, 128))[0] - 0.3 * 255) < 2


# the wing composer


@pytest.fixture(scope="module")
def vae():
    """A model with two numbers in each cell, in evaluation mode, with batch norms that do something."""
    import pegasus_vae as pv

    torch.manual_seed(0)
    vae = pv.VAE(pv.Config(latent_size=SIDE, latent_dim=2 * SIDE**2, base_channels=4))
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
def open_composer(pv, vae, pictures):
    """open_composer(picks): a composer of horses 7, 1 and 9 with birds 5, 0 and 3."""
    horse_images, bird_images = torch.zeros(2, 10, 3, 64, 64, dtype=torch.uint8)
    horse_images[[7, 1, 9]], bird_images[[5, 0, 3]] = pictures[:3], pictures[3:]
    horses, birds = (
        pv.Candidates(images, pv.encode_mean(vae, images), [0] * 10, True) for images in (horse_images, bird_images)
    )
    guesses = [pv.guess_cells(pv.Composition(bird=bird, scale=0.7), birds.images[bird]) for bird in (5, 0, 3)]
    return lambda picks: pv.WingComposer(vae, horses, birds, [7, 1, 9], [5, 0, 3], picks, guesses)


def fields(composer):
    """What the widgets say, as fields of a composition."""
    ticks = "".join("#" if box.value else "." for box in composer.cells.values())
    cells = tuple(ticks[start : start + 8] for start in range(0, 64, 8))
    return {name: widget.value for name, widget in composer.fields.items()} | {"cells": cells}


def test_it_shows_what_is_kept_or_a_guess_and_looking_writes_nothing(picks, open_composer, path):
    before, composer = path.stat().st_ino, open_composer(picks)
    assert fields(composer) == picks.choices.compositions[7].model_dump()
    assert status(composer) == "horse 1 of 3, #7: composed · your own choices, saved"
    for button in ("Next", "Next", "Next", "Previous"):
        composer.buttons[button].click()
    assert "horse 2 of 3, #1: first guess" in status(composer)
    assert fields(composer) == composer.guesses[1].model_dump() and path.stat().st_ino == before
    composer.buttons["Previous"].click()
    composer.buttons["Previous"].click()
    assert "horse 1 of 3" in status(composer) and list(picks.choices.compositions) == [7]
    assert path.stat().st_ino == before and picks.past == []


VALUES = {
    "scale": 1.2,
    "turn": -30,
    "right": -2,
    "down": 0.5,
    "bird": 3,
    "mirror": False,
    "dark_winged": True,
    "tint": 1,
    "good": True,
}


@pytest.mark.parametrize("name, value", VALUES.items())
def test_every_field_changes_the_file_and_the_pegasus_and_undo_takes_it_back(
    picks, open_picks, open_composer, name, value
):
    composer = open_composer(picks)
    before, drawn = picks.choices.compositions[7], composer.pictures["pegasus"].value
    composer.fields[name].value = value
    assert open_picks().choices.compositions == {7: before.model_copy(update={name: value})}
    assert (composer.pictures["pegasus"].value == drawn) == (name == "good")
    composer.buttons["Undo"].click()
    assert open_picks().choices.compositions == {7: before} and fields(composer) == before.model_dump()
    assert composer.pictures["pegasus"].value == drawn


def test_mending_waits_for_a_prior_and_then_redraws_the_wing_only(pv, picks, open_picks, open_composer):
    composer = open_composer(picks)
    assert composer.fields["mend"].disabled and composer.fields["mend"].value == 0
    drawn = composer.pictures["pegasus"].value
    torch.manual_seed(0)
    composer.prior = pv.FlowPrior((2, SIDE, SIDE), ["bird", "horse"], 24, depth=1).eval()
    composer.attempt(composer.go_to, composer.page)
    assert not composer.fields["mend"].disabled and composer.pictures["pegasus"].value == drawn
    composer.fields["mend"].value = 0.5
    assert open_picks().choices.compositions[7].mend == 0.5 and composer.pictures["pegasus"].value != drawn
    composer.buttons["Undo"].click()
    assert composer.fields["mend"].value == 0 and composer.pictures["pegasus"].value == drawn


def test_a_click_on_a_cell_gives_its_block_to_the_bird_and_another_takes_it_back(picks, open_picks, open_composer):
    composer = open_composer(picks)
    click(composer.cells[5, 6])
    assert open_picks().choices.compositions[7].cells == (*WING[:5], "......#.", *WING[6:])
    click(composer.cells[0, 0], False)
    assert open_picks().choices.compositions[7].cells == (".#######", *WING[1:5], "......#.", *WING[6:])
    assert composer.cells[5, 6].description == "row 6, column 7"


def test_clear_and_guess_set_the_cells_of_the_bird_as_it_is_placed(pv, picks, open_composer, pictures):
    composer = open_composer(picks)
    composer.buttons["Clear"].click()
    cleared = picks.choices.compositions[7]
    assert not cleared.mask.any() and not any(box.value for box in composer.cells.values()) and cleared.scale == 0.7
    composer.buttons["Guess"].click()
    guess = pv.guess_cells(cleared, pictures[3])  # bird 5
    assert picks.choices.compositions[7] == guess and fields(composer) == guess.model_dump() and guess.mask.any()


def test_the_next_horse_keeps_its_own(pv, picks, open_picks, open_composer):
    composer = open_composer(picks)
    first, guess = picks.choices.compositions[7], composer.guesses[1]
    composer.buttons["Next"].click()
    composer.fields["mirror"].value = True
    assert open_picks().choices.compositions == {7: first, 1: guess.model_copy(update={"mirror": True})}
    assert "horse 2 of 3, #1: composed" in status(composer)


def test_the_pictures_are_those_of_the_horse_that_is_shown(pv, vae, pictures, picks, open_composer):
    composer = open_composer(picks)
    composer.buttons["Next"].click()
    guess = composer.guesses[1]
    z = pv.compose(vae, composer.horses.latents[1:2], pictures[4:5], [guess])
    expected = {"horse": pictures[1], "bird": pv.place_bird(pictures[4], guess), "pegasus": pv.decode_images(vae, z)[0]}
    for name, image in expected.items():
        assert composer.pictures[name].value == pv.jpeg((pv.as_float(image) * 255).round().byte(), 256), name


def test_undo_takes_back_the_latest_change_whichever_horse_is_shown(picks, open_composer):
    composer = open_composer(picks)
    composer.buttons["Next"].click()
    composer.fields["scale"].value = 1.5
    composer.buttons["Next"].click()
    composer.buttons["Undo"].click()
    assert list(picks.choices.compositions) == [7] and composer.horse == 9
    composer.buttons["Previous"].click()
    assert fields(composer) == composer.guesses[1].model_dump()


def test_two_notebooks_may_change_different_fields_of_one_composition(picks, open_picks, open_composer):
    composer, other = open_composer(picks), open_picks()
    common = other.choices.compositions[7]
    other.edit(("compositions", 7, common.model_copy(update={"scale": 1.1, "cells": WING[::-1]})))
    composer.fields["good"].value = True
    both = common.model_copy(update={"scale": 1.1, "cells": WING[::-1], "good": True})
    assert open_picks().choices.compositions == {7: both} and fields(composer) == both.model_dump()
    other.edit(("compositions", 7, both.model_copy(update={"cells": WING})))
    click(composer.cells[0, 1])  # on the composer's screen row 1 is still empty
    assert open_picks().choices.compositions == {7: both.model_copy(update={"cells": WING})}
    assert fields(composer)["cells"] == WING, "the click found its block taken already, and the screen follows"
    composer.buttons["Undo"].click()
    good = both.model_copy(update={"cells": WING, "good": False})
    assert open_picks().choices.compositions == {7: good}, "undo takes back the field, and not the other's"
    composer.fields["good"].value = True
    click(composer.cells[7, 0])
    assert open_picks().choices.compositions[7].cells == (*WING[:7], "#.......")


def test_a_bird_that_nobody_has_picked_is_shown_and_can_be_chosen(picks, open_picks, open_composer):
    composer = open_composer(picks)
    assert [index for _, index in composer.fields["bird"].options] == [5, 0, 3, 1, 2, 4, 6, 7, 8, 9]
    elsewhere = picks.choices.compositions[7].model_copy(update={"bird": 8})
    picks.edit(("compositions", 7, elsewhere))
    assert fields(composer) == elsewhere.model_dump() and "composed" in status(composer)
    composer.fields["bird"].value = 6
    assert open_picks().choices.compositions == {7: elsewhere.model_copy(update={"bird": 6})}


def test_a_full_disk_is_said_by_the_composer_too(picks, open_picks, open_composer, path):
    composer = open_composer(picks)
    fill_the_disk(path)
    click(composer.cells[5, 1])
    assert "NOT saved" in status(composer) and composer.cells[5, 1].value
    click(composer.cells[5, 2])
    assert "NOT saved" not in status(composer)
    assert open_picks().choices.compositions[7].cells == (*WING[:5], ".##.....", *WING[6:])


def test_clicks_on_other_pickers_do_not_draw_the_pegasus_again(pv, monkeypatch, picks, open_composer):
    composer = open_composer(picks)
    monkeypatch.setattr(pv, "compose", None)
    picks.change("horse", 3, True)
    assert composer.trouble is None and fields(composer) == picks.choices.compositions[7].model_dump()
    picks.change("best", 1, True)
    composer.fields["turn"].value = 5
    assert "TypeError" in composer.trouble, "what changes the pegasus does"


def test_a_second_run_of_the_notebook_closes_the_pickers_of_the_first(pv, picks, open_composer):
    old, source = open_composer(picks), inspect.getsource(pv.Controls)
    exec(source, again := dict(vars(pv)))
    assert again["Controls"] is not pv.Controls and again["Controls"].latest["composer"] is old


def test_an_older_composer_is_closed_and_no_widget_of_it_is_left(pv, picks, open_composer):
    old = open_composer(picks)
    count = widget_count(pv)
    new = open_composer(picks)
    assert old.comm is None and all(box.comm is None for box in old.cells.values()) and new.comm is not None
    assert widget_count(pv) == count


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("end", [1, 3])
def test_a_progress_bar_leaves_no_widgets(pv, monkeypatch, delay, end):
    bar = lambda *items, **words: tqdm.notebook.tqdm(*items, **words | {"delay": delay})  # noqa: E731
    monkeypatch.setattr(pv, "tqdm", bar)
    monkeypatch.setattr(tqdm.notebook, "display", lambda box: None)
    count = widget_count(pv)
    assert list(itertools.islice(pv.progress(range(3), "three"), end)) == [0, 1, 2][:end]
    assert widget_count(pv) == count


def test_a_change_of_the_composition_leaves_no_widgets(pv, monkeypatch, picks, open_composer):
    monkeypatch.setattr(pv, "tqdm", tqdm.notebook.tqdm)
    composer = open_composer(picks)
    count = widget_count(pv)
    click(composer.cells[0, 3], not composer.cells[0, 3].value)
    assert widget_count(pv) == count
