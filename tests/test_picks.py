"""The file of picks and the picker, without a browser."""

import io
import json
import re
import threading
import time
from functools import partial

import pytest
import torch
from filelock import FileLock

HORSES, BIRDS = [1000 + i for i in range(12)], [2000 + i for i in range(12)]  # checksums of the candidates


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picks.json"


@pytest.fixture
def shipped(tmp_path):
    return tmp_path / "shipped.json"


@pytest.fixture
def open_picks(pv, path, shipped):
    """Open the file of picks, as the notebook does when it is started; keywords change what is passed."""

    def open_picks(path=path, shipped=shipped, horses=HORSES, birds=BIRDS, target=4, maker="one"):
        return pv.PicksFile(path, shipped, {"horse": horses, "bird": birds}, target, maker)

    return open_picks


@pytest.fixture
def picks(open_picks):
    """Three horses, two birds of which one has dark wings, and a best pegasus; all on the disk."""
    picks = open_picks()
    for horse in (7, 2, 9):
        picks.change("horse", horse, True)
    for bird in (5, 3):
        picks.change("bird", bird, True)
    picks.change("dark", 5, True)
    picks.change("best", 1, True)
    return picks


@pytest.fixture
def ship(picks, path, shipped):
    """Make the picks the shipped ones: the reader has none of their own yet."""
    path.rename(shipped)


def state(picks):
    return {group: picks[group] for group in ("horse", "bird", "dark", "best")}


PICKED = {"horse": [7, 2, 9], "bird": [5, 3], "dark": [5], "best": [1]}
NOTHING = {"horse": [], "bird": [], "dark": [], "best": []}


def edit(path, **changes):
    """Change entries of a picks file by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_picked_is_read_again_in_the_same_order(picks, open_picks):
    again = open_picks()
    assert state(again) == state(picks) == PICKED
    assert again.origin == "your own" and again.notes == []


def test_the_file_can_be_read_by_people(picks, path):
    content = json.loads(path.read_text())
    assert content["horse"] == [{"index": i, "crc32": HORSES[i]} for i in (7, 2, 9)]
    assert content["bird"] == [{"index": 5, "crc32": BIRDS[5], "dark": True}, {"index": 3, "crc32": BIRDS[3]}]
    assert content["data"]["split"] == "test" and content["version"] == 1


def test_without_any_file_nothing_is_picked_and_nothing_is_written(open_picks, tmp_path):
    picks = open_picks()
    assert state(picks) == NOTHING and picks.origin == "none"
    assert list(tmp_path.iterdir()) == []


def test_shipped_picks_are_used_until_the_reader_changes_one(ship, open_picks, path, shipped):
    original = shipped.read_bytes()
    picks = open_picks()
    assert state(picks) == PICKED and picks.origin == "shipped" and not path.exists()
    picks.change("horse", 0, True)
    assert picks.origin == "your own"
    assert open_picks()["horse"] == [7, 2, 9, 0]
    assert shipped.read_bytes() == original


def test_shipped_picks_are_cut_to_the_target_and_ignored_for_other_data(ship, open_picks):
    assert open_picks(target=2)["horse"] == [7, 2]
    other = open_picks(horses=HORSES[::-1])
    assert state(other) == NOTHING and other.origin == "none"


def test_the_best_pegasus_is_remembered_for_the_weights_that_made_it(picks, open_picks):
    two = open_picks(maker="two")
    assert state(two) == PICKED | {"best": []}
    two.change("best", 3, True)
    assert open_picks(maker="one")["best"] == [1] and open_picks(maker="two")["best"] == [3]


def test_a_best_without_the_parents_it_was_picked_with_is_forgotten(picks, open_picks, path):
    horses = json.loads(path.read_text())["horse"]
    edit(path, horse=horses[::-1])
    again = open_picks()
    assert state(again) == PICKED | {"horse": [9, 2, 7], "best": []} and again.notes == []


def test_a_best_is_not_taken_from_pegasi_of_earlier_picks(picks, open_picks, open_picker):
    for horse in (0,):
        picks.change("horse", horse, True)
    picks.fill("bird", range(12))
    picks.require()  # the batch is drawn
    picker = open_picker(picks, "best")
    click(picker, 2)
    assert picks["best"] == [2]
    picks.change("dark", 3, True)  # and not drawn again
    click(picker, 1)
    assert picks["best"] == [] == ticked(picker) and "run the cells above again" in status(picker)
    picks.require()
    click(picker, 1)
    assert picks["best"] == open_picks()["best"] == [1]


@pytest.mark.parametrize("group, index", [("horse", 0), ("bird", 0), ("dark", 3)])
def test_other_parents_make_other_pegasi_so_the_best_is_forgotten(picks, group, index):
    picks.change(group, index, True)
    assert picks["best"] == []
    picks.undo()
    assert picks["best"] == [1]


@pytest.mark.parametrize("group, index", [("horse", 12), ("bird", -1), ("horse", 1.5)])
def test_what_is_no_candidate_is_refused_and_later_changes_are_saved(pv, picks, open_picks, group, index):
    with pytest.raises(pv.ReaderError, match=f"there is no {group} {index}: 0 to 11"):
        picks.change(group, index, True)
    picks.change("horse", 0, True)
    assert picks.failure is None and open_picks()["horse"] == [7, 2, 9, 0]


def test_the_latest_three_are_the_best(picks, open_picks):
    for best in (3, 0, 2):
        picks.change("best", best, True)
    assert picks["best"] == open_picks()["best"] == [3, 0, 2]
    picks.change("best", 0, False)
    assert picks["best"] == open_picks()["best"] == [3, 2]


def test_an_unpicked_bird_loses_its_mark_and_an_undo_gives_it_back(picks, open_picks):
    picks.change("bird", 5, False)
    assert picks["bird"] == [3] and picks["dark"] == []
    picks.undo()
    assert state(picks) == state(open_picks()) == PICKED


def test_only_a_picked_bird_can_be_marked(picks):
    picks.change("dark", 0, True)
    assert picks["dark"] == [5]


def test_every_change_can_be_undone_to_the_beginning_and_no_further(picks, open_picks):
    for _ in range(7):
        assert state(picks) != NOTHING
        picks.undo()
    assert state(picks) == state(open_picks()) == NOTHING
    picks.undo()
    assert state(picks) == NOTHING


def test_a_change_that_changes_nothing_is_no_step_for_undo(picks):
    picks.change("horse", 7, True)
    picks.change("horse", 0, False)
    picks.undo()
    assert state(picks) == PICKED | {"best": []}


def test_what_is_handed_out_is_a_copy(picks):
    picks["horse"].append(11)
    assert picks["horse"] == [7, 2, 9]


def test_filling_keeps_earlier_picks_stops_at_the_target_and_is_one_step_for_undo(picks, open_picks):
    picks.fill("bird", [3, 8, 5, 1, 0])
    assert picks["bird"] == open_picks()["bird"] == [5, 3, 8, 1] and picks["dark"] == [5]
    picks.fill("bird", range(12))  # full: nothing changes, and there is nothing to undo
    assert picks["bird"] == [5, 3, 8, 1]
    picks.undo()
    assert state(picks) == PICKED


def test_suggestions_are_nobodys_picks_until_one_is_changed(open_picks, path):
    picks = open_picks()
    picks.suggest({"horse": [4, 7, 1, 2, 3], "bird": torch.tensor([9, 8, 7, 6, 5])})
    assert picks["horse"] == [4, 7, 1, 2] and picks["bird"] == [9, 8, 7, 6]
    assert picks.origin == "suggested" and not path.exists()
    picks.change("horse", 4, False)
    assert picks.origin == "your own" and open_picks()["horse"] == [7, 1, 2]


def test_filling_takes_the_indices_of_a_tensor(picks, open_picks):
    picks.fill("horse", torch.tensor([4, 7]))
    assert open_picks()["horse"] == [7, 2, 9, 4]


def test_enough_picks_are_handed_over_as_they_are_in_the_file_now(picks, open_picks):
    picks.change("horse", 0, True)
    picks.fill("bird", [3, 8, 5, 1])
    horses, birds, dark_winged = picks.require()
    assert (horses, birds, dark_winged.tolist()) == ([7, 2, 9, 0], [5, 3, 8, 1], [True, False, False, False])
    other = open_picks()
    other.change("dark", 8, True)
    assert picks.require()[2].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "birds, message", [([], "2 of 4 birds picked: pick 2 more"), ([0, 1, 2, 4], "6 of 4 birds picked: remove 2")]
)
def test_too_few_and_too_many_picks_are_refused_with_what_to_do(pv, picks, birds, message):
    picks.change("horse", 0, True)
    for bird in birds:
        picks.change("bird", bird, True)
    with pytest.raises(pv.ReaderError, match=message):
        picks.require()


UNREADABLE = {
    "not JSON": b"horses: 7, 2, 9",
    "not text": b"\x80\x81\x82",
    "empty": b"",
    "a list": b"[]",
    "a number": b"7",
    "without its parts": b"{}",
}


@pytest.mark.parametrize("content", [*UNREADABLE.values(), None], ids=[*UNREADABLE, "truncated"])
def test_an_unreadable_file_is_set_aside_and_the_shipped_picks_are_used(pv, ship, open_picks, path, shipped, content):
    content = shipped.read_bytes()[:-40] if content is None else content
    path.write_bytes(content)
    picks = open_picks()
    assert state(picks) == PICKED and picks.origin == "shipped"
    (aside,) = path.parent.glob("picks.bad-*.json")
    assert aside.read_bytes() == content and not path.exists()
    assert len(picks.notes) == 1 and aside.name in picks.notes[0]


def test_the_status_line_says_that_a_file_was_set_aside(ship, open_picks, path, open_picker):
    path.write_text("{")
    picker = open_picker(open_picks(), "horse")
    assert "picks.bad-" in status(picker)


def test_a_file_of_another_version_is_refused_and_left_alone(pv, picks, open_picks, path):
    edit(path, version=2)
    before = path.read_bytes()
    with pytest.raises(pv.ReaderError, match=rf"{path} .*\b2\b.*\b1\b"):
        open_picks()
    assert path.read_bytes() == before


def test_a_file_of_another_version_with_another_layout_is_refused_and_left_alone(pv, picks, open_picks, path):
    path.write_text(json.dumps({"schema": "pegasus_vae picks", "version": 2, "groups": {"horse": [7, 2]}}))
    before = path.read_bytes()
    with pytest.raises(pv.ReaderError, match=rf"{path} .*\b2\b.*\b1\b"):
        open_picks()
    assert path.read_bytes() == before


def test_a_file_of_other_data_is_refused_with_both_named_and_left_alone(pv, picks, open_picks, path):
    before, theirs = path.read_bytes(), json.loads(path.read_text())["data"]["digest"]
    with pytest.raises(pv.ReaderError) as refusal:
        open_picks(horses=HORSES[::-1])
    ours = open_picks(path=path.with_name("new.json"), horses=HORSES[::-1]).data["digest"]
    assert str(path) in str(refusal.value) and theirs in str(refusal.value) and ours in str(refusal.value)
    assert path.read_bytes() == before


BAD_ENTRIES = {
    "beyond the end": {"index": 12, "crc32": 0},
    "negative": {"index": -1, "crc32": HORSES[-1]},
    "another picture": {"index": 4, "crc32": HORSES[5]},
    "without a checksum": {"index": 4},
    "picked twice": {"index": 7, "crc32": HORSES[7]},
    "a word for an index": {"index": "four", "crc32": HORSES[4]},
    "a bare number": 4,
    "nothing": None,
}


@pytest.mark.parametrize("entry", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_dropped_and_reported_and_the_rest_is_kept(picks, open_picks, path, entry):
    horses = json.loads(path.read_text())["horse"]
    edit(path, horse=[horses[0], entry, *horses[1:]])
    again = open_picks()
    assert state(again) | {"best": []} == PICKED | {"best": []}
    assert len(again.notes) == 1 and "horse" in again.notes[0] and str(entry) in again.notes[0]


@pytest.mark.parametrize("index", [[4], "x", [-1], None, 1, [[1]], ["1"], [1.0], [True]], ids=str)
def test_a_bad_best_is_dropped_and_reported_and_the_rest_is_kept(picks, open_picks, path, index):
    best = json.loads(path.read_text())["best"]
    edit(path, best={"one": best["one"] | {"indices": index}})  # there are four pegasi, 0 to 3
    again = open_picks()
    assert state(again) == PICKED | {"best": []}
    assert len(again.notes) == 1 and f"best {index} dropped" in again.notes[0]


@pytest.mark.parametrize("best", [1, [1], "number 1"], ids=str)
def test_a_best_of_nothing_is_dropped_and_reported_and_the_rest_is_kept(picks, open_picks, path, best):
    edit(path, best=best)
    again = open_picks()
    assert state(again) == PICKED | {"best": []}
    assert len(again.notes) == 1 and f"best {best} dropped" in again.notes[0]


def test_a_file_that_cannot_be_read_again_is_not_lost_on_the_first_change(ship, open_picks, path):
    path.write_text("precious, if illegible")
    open_picks().change("horse", 0, True)
    assert [file.read_text() for file in path.parent.glob("picks.bad-*.json")] == ["precious, if illegible"]
    assert open_picks()["horse"] == [7, 2, 9, 0]


def test_where_no_folder_can_be_made_picks_stay_in_memory_and_the_status_says_not_saved(
    open_picks, open_picker, tmp_path
):
    (tmp_path / "outputs").write_text("a file, not a folder")
    picks = open_picks(path=tmp_path / "outputs" / "picks.json")
    picker = open_picker(picks, "horse")
    click(picker, 3)
    assert picks["horse"] == [3] and picks.failure
    assert "1 of 4 horses picked" in status(picker) and "NOT saved" in status(picker)


def fill_the_disk(path):
    """The next write beside path ends on the device that is always full."""
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")


def test_a_full_disk_keeps_the_old_file_and_the_next_change_saves_everything(picks, open_picks, open_picker, path):
    picker, before = open_picker(picks, "horse"), path.read_bytes()
    fill_the_disk(path)
    click(picker, 0)
    assert picks["horse"] == [7, 2, 9, 0] and picks.failure and path.read_bytes() == before
    assert "NOT saved" in status(picker) and "No space left" in status(picker) and ticked(picker) == [0, 2]
    click(picker, 1)
    assert picks.failure is None and "NOT saved" not in status(picker)
    assert open_picks()["horse"] == [7, 2, 9, 0, 1]


def test_two_notebooks_on_one_file_keep_the_changes_of_both(picks, open_picks):
    one, two = picks, open_picks()
    one.change("horse", 11, True)
    two.change("horse", 2, False)
    two.change("bird", 0, True)
    one.change("dark", 3, True)
    two.change("dark", 5, False)
    both = {"horse": [7, 9, 11], "bird": [5, 3, 0], "dark": [3], "best": []}
    assert state(two) == state(open_picks()) == both


def test_an_unpicked_bird_is_not_marked_by_the_other_notebook(picks, open_picks):
    one, two = picks, open_picks()
    one.change("bird", 3, False)
    two.change("dark", 3, True)
    assert state(two) == state(open_picks()) == PICKED | {"bird": [5], "best": []}


def test_the_best_of_two_notebooks_are_merged(picks, open_picks):
    one, two = picks, open_picks()
    one.change("best", 3, True)
    two.change("best", 2, True)
    assert two["best"] == open_picks()["best"] == [1, 3, 2]


def test_undo_does_not_reach_behind_a_merge(picks, open_picks):
    one, two = picks, open_picks()
    two.change("horse", 11, True)
    one.change("horse", 0, True)
    one.undo()
    assert one["horse"] == open_picks()["horse"] == [7, 2, 9, 11, 0]
    one.change("horse", 1, True)
    one.undo()
    assert one["horse"] == open_picks()["horse"] == [7, 2, 9, 11, 0]


def test_an_edit_by_hand_while_the_notebook_is_open_is_kept(picks, open_picks, path):
    edit(path, horse=[{"index": 1, "crc32": HORSES[1]}, {"index": 7, "crc32": HORSES[7]}])
    picks.change("bird", 0, True)
    assert picks["horse"] == open_picks()["horse"] == [1, 7] and picks["bird"] == [5, 3, 0]


def test_a_file_damaged_while_the_notebook_is_open_is_set_aside_and_nothing_is_lost(picks, open_picks, path):
    path.write_text("{")
    picks.change("horse", 0, True)
    assert len(list(path.parent.glob("picks.bad-*.json"))) == 1 and picks.failure is None
    assert state(open_picks()) == PICKED | {"horse": [7, 2, 9, 0], "best": []}


def test_a_file_of_other_data_that_appears_meanwhile_is_left_alone_and_nothing_is_lost(picks, open_picker, path):
    edit(path, data={"split": "test", "digest": "of other pictures"})
    picker, before = open_picker(picks, "horse"), path.read_bytes()
    click(picker, 0)
    assert path.read_bytes() == before and picks["horse"] == [7, 2, 9, 0]
    assert "NOT saved" in status(picker) and "of other pictures" in status(picker)


def test_a_deleted_file_is_written_again_with_all_that_is_on_the_screen(picks, open_picks, path):
    path.unlink()
    picks.change("horse", 0, True)
    assert state(open_picks()) == PICKED | {"horse": [7, 2, 9, 0], "best": []}


def test_a_file_that_someone_else_holds_is_waited_for_and_then_reported(pv, picks, monkeypatch, path):
    monkeypatch.setattr(pv, "FileLock", partial(pv.FileLock, blocking=False))
    with FileLock(f"{path}.lock"):
        picks.change("horse", 0, True)
    assert "picks.json.lock" in picks.failure and picks["horse"] == [7, 2, 9, 0]


def test_suggestions_do_not_crowd_out_what_another_notebook_saved(open_picks):
    one, two = open_picks(), open_picks()
    two.suggest({"horse": [4, 5, 6, 7], "bird": [4, 5, 6, 7]})
    one.change("horse", 1, True)
    two.change("horse", 2, True)
    assert two["horse"] == [1, 2]


def test_changes_from_several_threads_at_once_are_all_kept(open_picks):
    many = list(range(120))
    picks = open_picks(horses=many, birds=many)

    def pick(group, start):
        for index in range(start, 120, 3):
            picks.change(group, index, True)

    threads = [threading.Thread(target=pick, args=(group, start)) for group in ("horse", "bird") for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = open_picks(horses=many, birds=many)
    assert sorted(picks["horse"]) == sorted(picks["bird"]) == many
    assert state(again) == state(picks)


def test_changes_from_four_threads_of_two_notebooks_at_once_are_all_kept(open_picks):
    many = list(range(80))
    notebooks = [open_picks(horses=many, birds=many) for _ in range(2)]

    def pick(notebook, group, half):
        for index in many[half::2]:
            notebook.change(group, index, True)

    work = [(notebook, group, half) for half, notebook in enumerate(notebooks) for group in ("horse", "bird")]
    threads = [threading.Thread(target=pick, args=arguments) for arguments in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [notebook.failure for notebook in notebooks] == [None, None]
    final = open_picks(horses=many, birds=many)
    assert sorted(final["horse"]) == sorted(final["bird"]) == many


@pytest.fixture
def open_picker(pv):
    """open_picker(picks, group): a picker of twelve pictures, five a page."""
    torch.manual_seed(0)
    images = torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8)
    sorts = {"file order": list(range(12)), "backwards": list(range(11, -1, -1))}
    options = {"per_page": 5}
    return lambda picks, group, **more: pv.ImagePicker(images.__getitem__, picks, group, sorts, **options | more)


def shown(picker):
    """Numbers of the pictures on the page."""
    return [int(cell.children[1].description.removeprefix("#")) for cell in picker.grid.children]


def ticked(picker):
    """Numbers of the pictures on the page whose checkbox is ticked."""
    return [number for number, cell in zip(shown(picker), picker.grid.children) if cell.children[1].value]


def checkbox(picker, number):
    return picker.grid.children[shown(picker).index(number)].children[1]


def click(picker, number, value=True):
    """What the message of a browser does when a checkbox on the page is clicked."""
    checkbox(picker, number).set_state({"value": value})


def status(picker):
    return re.sub("<[^>]*>", "", picker.status.value)


def test_a_click_picks_at_once_and_a_second_click_unpicks(picks, open_picks, open_picker):
    picker = open_picker(picks, "bird")
    assert ticked(picker) == [3]
    click(picker, 4)
    assert open_picks()["bird"] == [5, 3, 4]
    click(picker, 3, False)
    assert open_picks()["bird"] == [5, 4] and ticked(picker) == [4]


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
    seen = checkbox(picker, 0)
    picker.buttons["Next"].click()
    seen.set_state({"value": True})
    assert picks["bird"] == [5, 3, 0] and ticked(picker) == [5]
    picker.buttons["Previous"].click()
    assert ticked(picker) == [0, 3]


def test_another_order_starts_on_its_first_page(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.buttons["Next"].click()
    picker.sort.set_state({"index": 1})
    assert shown(picker) == [11, 10, 9, 8, 7]


def test_the_filter_shows_picked_or_unpicked_pictures_only(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.show.value = "picked"
    assert shown(picker) == [3, 5]
    picker.show.value = "not picked"
    assert shown(picker) == [0, 1, 2, 4, 6]
    click(picker, 0)
    assert 0 not in shown(picker)
    picker.show.value = "all"
    assert shown(picker) == [0, 1, 2, 3, 4] and ticked(picker) == [0, 3]


def test_suggest_fills_up_from_the_chosen_order_and_undo_takes_it_back(picks, open_picker):
    picker = open_picker(picks, "bird")
    picker.sort.set_state({"index": 1})
    picker.buttons["Suggest"].click()
    assert picks["bird"] == [5, 3, 11, 10] and ticked(picker) == [11, 10]
    assert "4 of 4 birds picked" in status(picker)
    picker.buttons["Undo"].click()
    assert picks["bird"] == [5, 3] and ticked(picker) == []


def test_the_dark_picker_shows_the_picked_birds_as_they_are_now(picks, open_picker):
    birds, dark = open_picker(picks, "bird"), open_picker(picks, "dark")
    assert shown(dark) == [3, 5] and ticked(dark) == [5]
    click(birds, 1)
    assert shown(dark) == [1, 3, 5]
    click(dark, 1)
    assert picks["dark"] == [5, 1] and "2 birds marked as dark-winged" in status(dark)
    click(birds, 1, False)
    assert shown(dark) == [3, 5] and picks["dark"] == [5]


def test_an_emptied_page_of_the_dark_picker_gives_way_to_the_one_before(picks, open_picker):
    dark = open_picker(picks, "dark", per_page=1)
    dark.buttons["Next"].click()
    assert shown(dark) == [5]
    picks.change("bird", 5, False)
    assert shown(dark) == [3] and "page 1 of 1" in status(dark)


def test_marks_and_best_cannot_be_suggested(picks, open_picker):
    assert "Suggest" not in open_picker(picks, "dark").buttons
    assert "Suggest" not in open_picker(picks, "best").buttons


def test_a_fourth_best_unticks_the_first(picks, open_picker, open_picks):
    picker = open_picker(picks, "best")
    assert ticked(picker) == [1]
    click(picker, 3)
    click(picker, 4)
    assert ticked(picker) == [1, 3, 4] and "3 of 3 best pegasi picked" in status(picker)
    click(picker, 0)
    assert ticked(picker) == [0, 3, 4] and open_picks(target=5)["best"] == [3, 4, 0]


def test_the_status_counts_and_says_where_one_is_and_that_all_is_saved(picks, open_picker):
    picker = open_picker(picks, "bird")
    assert "2 of 4 birds picked" in status(picker) and "page 1 of 3" in status(picker)
    assert "saved" in status(picker) and "NOT" not in status(picker)
    picker.buttons["Next"].click()
    assert "page 2 of 3" in status(picker)
    for bird in (6, 7, 8, 9):
        click(picker, bird)
    assert "6 of 4 birds picked: remove 2" in status(picker)
    assert 'aria-live="polite"' in picker.status.value


def test_every_picture_has_a_label_with_its_number_and_is_a_jpeg(picks, open_picker):
    picker = open_picker(picks, "horse")
    picture, box = picker.grid.children[2].children
    assert box.description == "#2"
    assert picture.format == "jpeg" and bytes(picture.value[:2]) == b"\xff\xd8"


def test_thousands_of_candidates_cost_no_more_than_a_page(pv, open_picks):
    many = list(range(1339))
    images = torch.zeros(1339, 3, 64, 64, dtype=torch.uint8)
    looked_at = []
    picks = open_picks(horses=many, birds=many)
    picker = pv.ImagePicker(lambda index: looked_at.append(index) or images[index], picks, "bird", {"file order": many})
    assert looked_at == many[:40] and "page 1 of 34" in status(picker)
    for _ in range(33):
        picker.buttons["Next"].click()
    assert shown(picker) == many[1320:] and looked_at == many
    picker.buttons["Previous"].click()
    assert looked_at == many  # no picture is made twice


def test_an_order_may_depend_on_the_picks_and_is_made_when_it_is_chosen(pv, picks, open_picker):
    torch.manual_seed(0)
    latents = torch.randn(12, 8)
    sorts = {"file order": range(12), "most like my picks": partial(pv.most_like, latents)}
    picker = pv.ImagePicker(torch.zeros(12, 3, 8, 8, dtype=torch.uint8).__getitem__, picks, "bird", sorts)
    picker.sort.set_state({"index": 1})
    wanted = latents[[5, 3]].mean(dim=0)
    alike = torch.nn.functional.cosine_similarity(latents, wanted[None])
    expected = alike.argsort(descending=True).tolist()
    assert shown(picker) == expected
    click(picker, expected[-1])
    assert shown(picker) == expected  # pictures do not move under the reader's hand


def test_without_picks_nothing_is_most_like_them(pv):
    assert pv.most_like(torch.randn(5, 3), []) == [0, 1, 2, 3, 4]


def test_wide_pictures_keep_their_shape(pv):
    from PIL import Image

    wide = Image.open(io.BytesIO(pv.jpeg(torch.zeros(3, 64, 128, dtype=torch.uint8))))
    assert wide.size == (192, 96)


def test_what_a_file_says_cannot_become_part_of_the_page(picks, open_picks, open_picker, path):
    edit(path, horse=["<img src=x onerror=alert(1)>"])
    picker = open_picker(open_picks(), "horse")
    assert "<img" not in picker.status.value and "&lt;img" in picker.status.value


def test_a_newer_picker_of_a_group_takes_the_place_of_the_older(picks, open_picker):
    older, newer = open_picker(picks, "horse"), open_picker(picks, "horse")
    picks.change("horse", 0, True)
    assert ticked(newer) == [0, 2] and older.comm is None


def test_a_bird_stands_on_the_left_of_what_its_negative_decodes_to(pv, cfg, monkeypatch):
    torch.manual_seed(0)
    vae, latents = pv.VAE(cfg), torch.randn(3, cfg.latent_dim)
    images = torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    monkeypatch.setattr(pv, "vae", vae, raising=False)
    monkeypatch.setattr(pv, "birds", pv.Candidates(images, latents, [0, 1, 2], True), raising=False)
    pair = pv.beside_negative(2)
    assert pair.shape == (3, 64, 128) and torch.equal(pair[:, :, :64], images[2])
    expected = pv.decode_images(vae, -latents)[2] * 255
    assert (pair[:, :, 64:].float() - expected).abs().max() < 2


def test_the_best_is_enlarged_into_a_file_at_the_click(pv, cfg, picks, monkeypatch):
    from PIL import Image

    pegasi = torch.zeros(4, 3, 64, 64)
    pegasi[2] += 0.3
    cfg.output_dir.mkdir(parents=True)
    monkeypatch.setattr(pv, "cfg", cfg, raising=False)
    monkeypatch.setattr(pv, "pegasi", pegasi, raising=False)
    batch = (pegasi * 255).byte()
    picker = pv.ImagePicker(batch.__getitem__, picks, "best", {"as in the batch": range(4)}, on_pick=pv.save_best)
    picks.change("horse", 0, True)
    assert not (cfg.output_dir / "best.png").exists(), "other picks leave it alone"
    click(picker, 2)
    with Image.open(cfg.output_dir / "best.png") as best:
        assert best.size == (256, 256) and abs(best.getpixel((128, 128))[0] - 0.3 * 255) < 2
    monkeypatch.setattr(pv, "save_image", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    click(picker, 3)
    assert picks["best"] == [2, 3] and "No space left on device" in status(picker)


def test_what_goes_wrong_in_a_click_is_shown_and_ends_nothing(pv, picks, open_picks):
    def picture(index):
        if index == 7:
            raise RuntimeError("out of memory <here>")
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    picker = pv.ImagePicker(picture, picks, "bird", {"file order": range(12)}, per_page=5)
    picker.buttons["Next"].click()
    assert shown(picker) == [0, 1, 2, 3, 4] and "page 1 of 3" in status(picker)
    assert "RuntimeError: out of memory &lt;here&gt;" in status(picker)
    click(picker, 4)
    assert open_picks()["bird"] == [5, 3, 4] and "RuntimeError" not in status(picker)


def test_changes_at_the_same_time_in_one_notebook_wait_for_each_other(pv, open_picks, monkeypatch):
    one, two, merge = open_picks(), open_picks(), pv.PicksFile.merge
    two.change("horse", 1, True)
    monkeypatch.setattr(one, "merge", lambda *sides: time.sleep(0.2) or merge(*sides))
    first = threading.Thread(target=one.change, args=("horse", 2, True))
    first.start()
    time.sleep(0.05)  # inside the merge
    one.change("horse", 3, True)
    first.join()
    assert sorted(one["horse"]) == sorted(open_picks()["horse"]) == [1, 2, 3]


def test_picks_that_did_not_reach_the_disk_are_not_called_shipped(ship, open_picks, path):
    picks = open_picks()
    fill_the_disk(path)
    picks.change("horse", 0, True)
    assert picks.failure and picks.origin == "your own"


def test_what_was_merged_does_not_come_back_after_a_failed_write(picks, open_picks, path):
    one, two = picks, open_picks()
    one.change("bird", 9, True)
    fill_the_disk(path)
    two.change("horse", 0, True)
    assert two.failure and two["bird"] == [5, 3, 9]
    one.change("bird", 9, False)
    two.change("horse", 1, True)
    assert state(open_picks()) == PICKED | {"horse": [7, 2, 9, 0, 1], "best": []}


def test_a_best_is_not_kept_for_parents_that_the_other_notebook_changed(picks, open_picks):
    one, two = picks, open_picks()
    one.change("horse", 2, False)
    two.change("best", 3, True)
    assert two["best"] == open_picks()["best"] == []


def test_a_damaged_shipped_file_is_refused_and_left_alone(pv, ship, open_picks, shipped):
    shipped.write_text("{")
    with pytest.raises(pv.ReaderError, match=f"{shipped} is damaged: restore it"):
        open_picks()
    assert shipped.read_text() == "{"


def test_shipped_picks_are_filled_up_where_more_are_wanted(ship, open_picks, path):
    picks = open_picks()
    picks.suggest({"horse": [7, 4], "bird": [1, 2, 4]})
    assert state(picks) == {"horse": [7, 2, 9, 4], "bird": [5, 3, 1, 2], "dark": [5], "best": []}
    assert picks.origin == "suggested" and not path.exists()


def test_a_picker_that_is_made_again_leaves_no_widgets_behind(pv, picks, open_picker):
    from ipywidgets.widgets.widget import _instances

    open_picker(picks, "horse")
    counts = []
    for _ in range(3):
        open_picker(picks, "horse")
        counts.append(sum(type(widget).__name__ in ("Checkbox", "Image", "VBox") for widget in _instances.values()))
    assert counts[0] == counts[1] == counts[2]
