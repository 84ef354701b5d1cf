"""What a reader chooses, and the one file that keeps it: its model, transactions, undo, and all that can be wrong."""

import json
import multiprocessing
import random
import re
import threading
from functools import partial

import pytest
import torch
from filelock import FileLock
from pydantic import ValidationError

HORSES, BIRDS = [1000 + i for i in range(12)], [2000 + i for i in range(12)]  # checksums of the candidates
WING = ("##......",) + ("........",) * 7


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outputs" / "picks.json"


@pytest.fixture
def shipped(tmp_path):
    return tmp_path / "shipped.json"


@pytest.fixture
def open_picks(pv, path, shipped):
    """Open the file of choices, as the notebook does when it is started; keywords change what is passed."""

    def open_picks(path=path, horses=HORSES, birds=BIRDS, target=4, maker="one"):
        return pv.PicksFile(path, shipped, {"horse": horses, "bird": birds}, target, maker)

    return open_picks


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test here cuts the power, so none needs to wait for the disk."""
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture
def picks(pv, open_picks, path):
    """Three horses, two birds of which one has dark wings, a best pegasus and a composition; all on the disk."""
    empty = open_picks()
    chosen = {"horse": [7, 2, 9], "bird": [5, 3], "dark": [5]}
    chosen |= {"compositions": {7: pv.Composition(bird=5, cells=WING)}}
    path.parent.mkdir()
    path.write_text(pv.Choices(data=empty.data, **chosen).model_dump_json(indent=1))
    picks = open_picks()
    path.write_text(pv.Choices(data=empty.data, **chosen, best={picks.batch: [1]}).model_dump_json(indent=1))
    return open_picks()


def state(picks):
    """All that is chosen, as plain values; of a composition the bird, the scale, and how many cells are chosen."""
    compositions = {h: (c.bird, c.scale, int(c.mask.sum())) for h, c in picks.choices.compositions.items()}
    return {group: picks[group] for group in ("horse", "bird", "dark", "best")} | {"compositions": compositions}


BEFORE = {"horse": [7, 2, 9], "bird": [5, 3], "dark": [5], "best": [1], "compositions": {7: (5, 1, 2)}}
NOTHING = {"horse": [], "bird": [], "dark": [], "best": [], "compositions": {}}


def compose(picks, horse, **fields):
    import pegasus_vae as pv

    picks.edit(("compositions", horse, pv.Composition(**fields)))


# every kind of change, and what then differs from BEFORE
CHANGES = {
    "pick": (lambda picks: picks.change("horse", 0, True), {"horse": [7, 2, 9, 0]}),
    "unpick": (lambda picks: picks.change("horse", 2, False), {"horse": [7, 9]}),
    "unpick a marked bird": (lambda picks: picks.change("bird", 5, False), {"bird": [3], "dark": []}),
    "mark": (lambda picks: picks.change("dark", 3, True), {"dark": [5, 3]}),
    "unmark": (lambda picks: picks.change("dark", 5, False), {"dark": []}),
    "choose the best": (lambda picks: picks.change("best", 3, True), {"best": [1, 3]}),
    "fill": (lambda picks: picks.fill("bird", torch.tensor([3, 8, 5, 1, 0])), {"bird": [5, 3, 8, 1]}),
    "compose": (lambda picks: compose(picks, 2, bird=3), {"compositions": {7: (5, 1, 2), 2: (3, 1, 0)}}),
    "compose anew": (lambda picks: compose(picks, 7, bird=3, scale=0.5), {"compositions": {7: (3, 0.5, 0)}}),
}
each_change = pytest.mark.parametrize("change, after", CHANGES.values(), ids=CHANGES)


def edit(path, **parts):
    """Change parts of a file by hand."""
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


# the model


BAD_FIELDS = {
    "a letter for a cell": {"cells": ("x" * 8,) * 8},
    "too few rows": {"cells": ("." * 8,) * 7},
    "a short row": {"cells": (*("." * 8,) * 7, "...")},
    "no cells": {"cells": ()},
    "scale 0": {"scale": 0},
    "more than half a turn": {"turn": 181},
    "far away": {"right": 9},
    "not a number": {"down": float("nan")},
    "a negative bird": {"bird": -1},
    "an unknown field": {"colour": "white"},
}


@pytest.mark.parametrize("fields", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_composition_is_refused(pv, fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        pv.Composition(**{"bird": 0} | fields)


def test_the_mask_of_a_composition_is_true_where_the_cells_say_so(pv):
    assert pv.Composition(bird=0, cells=WING).mask.nonzero().tolist() == [[0, 0], [0, 1]]


def test_put_keeps_places_and_returns_what_undoes_it(pv):
    rng, choices = random.Random(0), pv.Choices(data="some")
    values = {"horse": [True], "dark": [True], "best": [[0], [1, 2]]}
    values["compositions"] = [
        *(pv.Composition(bird=bird) for bird in range(3)),
        {"scale": 0.5},
        {"turn": 3, "right": 1},
    ]
    states, inverses = [], []
    for _ in range(200):
        part = rng.choice(list(values))
        states.append(choices.model_dump_json())
        key = str(rng.randrange(5)) if part == "best" else rng.randrange(5)
        value = rng.choice([*values[part], None])
        if not isinstance(value, dict) or key in choices.compositions:
            inverses.append(choices.put(part, key, value))
        else:
            states.pop()
    assert len(set(states)) > 100
    while states:
        choices.put(*inverses.pop())
        assert choices.model_dump_json() == states.pop()


# one change, whatever is changed


@each_change
def test_a_change_is_on_the_disk_at_once_and_undo_takes_it_back(picks, open_picks, path, change, after):
    before = path.read_bytes()
    change(picks)
    assert state(picks) == BEFORE | after and picks.origin == "your own" and picks.failure is None
    assert open_picks().choices == picks.choices
    picks.undo()
    assert state(picks) == BEFORE and path.read_bytes() == before


@each_change
def test_a_change_that_changes_nothing_is_no_step_for_undo(picks, path, change, after):
    change(picks)
    written = path.stat().st_ino  # every write makes a new file
    change(picks)
    assert path.stat().st_ino == written
    picks.undo()
    assert state(picks) == BEFORE


@each_change
def test_listeners_hear_of_a_change_and_of_its_undo(picks, change, after):
    heard = []
    picks.listeners["test"] = lambda: heard.append(state(picks))
    change(picks)
    picks.undo()
    assert heard == [BEFORE | after, BEFORE]


@each_change
def test_the_changes_of_two_notebooks_are_kept_and_each_undoes_its_own(picks, open_picks, change, after):
    other = open_picks()
    other.change("horse", 11, True)
    compose(other, 4, bird=1)
    change(picks)
    final, expected = open_picks().choices, BEFORE | after
    assert picks.choices == final
    assert sorted(picks["horse"]) == sorted([*expected["horse"], 11])
    both = {"compositions": expected["compositions"] | {4: (1, 1, 0)}}
    assert state(picks) == expected | {"horse": picks["horse"]} | both
    picks.undo()
    assert state(picks) == BEFORE | {"horse": [7, 2, 9, 11], "compositions": {7: (5, 1, 2), 4: (1, 1, 0)}}
    other.undo()
    other.undo()
    assert state(other) == BEFORE and open_picks().choices == other.choices


@each_change
def test_shipped_choices_are_used_until_one_is_changed(picks, open_picks, path, shipped, change, after):
    path.rename(shipped)
    original = shipped.read_bytes()
    reader = open_picks()
    assert state(reader) == BEFORE and reader.origin == "shipped" and not path.exists()
    change(reader)
    assert state(reader) == BEFORE | after and reader.origin == "your own"
    assert open_picks().choices == reader.choices and shipped.read_bytes() == original
    reader.undo()
    assert state(reader) == BEFORE


def fill_the_disk(path, monkeypatch, pv):
    path.with_name(path.name + ".tmp").symlink_to("/dev/full")  # where the next write goes
    return lambda: path.with_name(path.name + ".tmp").unlink(missing_ok=True)


def take_the_folder(path, monkeypatch, pv):
    moved = path.parent.rename(path.parent.with_name("moved"))
    path.parent.write_text("a file, not a folder")

    def mend():
        path.parent.unlink()
        moved.rename(path.parent)

    return mend


def hold_the_lock(path, monkeypatch, pv):
    monkeypatch.setattr(pv, "FileLock", partial(pv.FileLock, blocking=False))
    lock = FileLock(f"{path}.lock")
    lock.acquire()
    return lock.release


def put_other_data_there(path, monkeypatch, pv):
    content = path.read_text()
    edit(path, data="9 cats")
    return lambda: path.write_text(content)


TROUBLES = {
    "No space left": fill_the_disk,
    "File exists": take_the_folder,
    "picks.json.lock": hold_the_lock,
    "made on other data .9 cats": put_other_data_there,
}


@each_change
@pytest.mark.parametrize("message", TROUBLES)
def test_what_cannot_be_written_stays_and_goes_along_with_the_next_change(
    pv, picks, open_picks, path, monkeypatch, message, change, after
):
    mend = TROUBLES[message](path, monkeypatch, pv)
    content = path.read_bytes() if path.exists() else None
    change(picks)
    assert state(picks) == BEFORE | after
    assert re.search(message, picks.failure)
    assert content == (path.read_bytes() if path.exists() else None), "the file is left alone"
    mend()
    compose(picks, 11, bird=11)
    final = open_picks()
    assert picks.failure is None and final.choices == picks.choices
    assert final.choices.compositions.pop(11).bird == 11
    final.batch = picks.batch
    assert state(final) == BEFORE | after


@each_change
def test_a_file_that_was_deleted_or_damaged_meanwhile_is_written_again_whole(picks, open_picks, path, change, after):
    path.unlink()
    change(picks)
    assert state(picks) == BEFORE | after and open_picks().choices == picks.choices
    path.write_text("{")
    picks.undo()
    assert state(picks) == BEFORE and open_picks().choices == picks.choices and picks.failure is None
    (aside,) = path.parent.glob("picks.bad-*.json")
    assert aside.read_text() == "{" and aside.name in picks.notes[-1]


def test_undo_goes_back_to_the_beginning_and_no_further(picks, open_picks):
    states = [state(picks)]
    for change, _ in CHANGES.values():
        change(picks)
        if state(picks) != states[-1]:
            states.append(state(picks))
    assert len(states) > 6
    while states:
        assert state(picks) == states.pop()
        picks.undo()
    assert state(picks) == BEFORE and open_picks().choices == picks.choices


def test_what_is_handed_out_is_a_copy(picks):
    picks["horse"].append(11)
    assert state(picks) == BEFORE


def test_a_composition_with_no_bird_is_dropped_and_reported(picks, open_picks):
    compose(picks, 2, bird=12)
    picks.change("horse", 0, True)
    assert "left out of compositions" in picks.notes[-1]
    assert state(picks) == BEFORE | {"horse": [7, 2, 9, 0]} and open_picks().choices == picks.choices


@pytest.mark.parametrize("group, index", [("horse", 12), ("bird", -1), ("horse", 1.5), ("best", 4)])
def test_what_is_no_candidate_is_refused_and_later_changes_are_saved(pv, picks, open_picks, group, index):
    with pytest.raises(pv.ReaderError, match=f"there is no {group} {index}: 0 to "):
        picks.change(group, index, True)
    picks.change("horse", 0, True)
    assert state(picks) == BEFORE | {"horse": [7, 2, 9, 0]} and open_picks().choices == picks.choices


# several at once


def choose(picks, half, count=10):
    """Pick horses, mark birds and compose, each number of one parity."""
    for index in range(half, count, 2):
        picks.change("horse", index, True)
        picks.change("bird", index, True)
        picks.change("dark", index, True)
        compose(picks, index, bird=index)


def test_changes_of_four_threads_of_two_notebooks_are_all_kept(open_picks):
    notebooks = [open_picks(), open_picks()]
    work = [partial(choose, picks, half) for picks in notebooks for half in (0, 1)]
    threads = [threading.Thread(target=job) for job in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    final, everything = open_picks().choices, list(range(10))
    assert [notebook.failure for notebook in notebooks] == [None, None]
    assert sorted(final.horse) == sorted(final.bird) == sorted(final.dark) == sorted(final.compositions) == everything


def test_changes_of_two_processes_are_all_kept(open_picks):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=choose, args=(open_picks(), half)) for half in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    final, everything = open_picks().choices, list(range(10))
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(final.horse) == sorted(final.bird) == sorted(final.dark) == sorted(final.compositions) == everything


def test_an_unpicked_bird_is_not_marked_by_the_other_notebook(picks, open_picks):
    other = open_picks()
    picks.change("bird", 3, False)
    other.change("dark", 3, True)
    assert state(other) == BEFORE | {"bird": [5]} and open_picks().choices == other.choices


def test_the_best_of_two_notebooks_are_added_up(picks, open_picks):
    other = open_picks()
    picks.change("best", 3, True)
    other.change("best", 2, True)
    assert other["best"] == open_picks()["best"] == [1, 3, 2]


def test_filling_counts_what_the_other_notebook_has_picked(picks, open_picks):
    other = open_picks()
    picks.change("horse", 0, True)
    other.fill("horse", [4, 5])
    assert other["horse"] == open_picks()["horse"] == [7, 2, 9, 0]


def test_suggestions_do_not_crowd_out_what_another_notebook_saved(open_picks):
    one, two = open_picks(), open_picks()
    two.fill("horse", [4, 5, 6, 7], save=False)
    one.change("horse", 1, True)
    two.change("horse", 2, True)
    assert two["horse"] == [1, 2]


def test_an_edit_by_hand_while_the_notebook_is_open_is_kept(picks, open_picks, path):
    edit(path, horse=[1, 7])
    picks.change("bird", 0, True)
    assert open_picks().choices == picks.choices and picks["horse"] == [1, 7] and picks["bird"] == [5, 3, 0]


# what is found at the start


def test_without_any_file_nothing_is_chosen_and_nothing_is_written(open_picks, tmp_path):
    picks = open_picks()
    assert state(picks) == NOTHING and picks.origin == "none" and picks.notes == []
    assert list(tmp_path.iterdir()) == []


def test_what_was_chosen_is_read_again_and_can_be_read_by_people(picks, open_picks, path):
    again = open_picks()
    assert state(again) == BEFORE and again.origin == "your own" and again.notes == []
    content = json.loads(path.read_text())
    assert {part: content[part] for part in ("horse", "bird", "dark")} == {
        "horse": [7, 2, 9],
        "bird": [5, 3],
        "dark": [5],
    }
    assert content["data"].startswith("12 horses, 12 birds, ") and content["format"] == "pegasus_vae choices 2"
    assert list(content["best"].values()) == [[1]] and content["compositions"]["7"]["cells"] == list(WING)


DAMAGED = {
    "not JSON": "horses: 7, 2, 9",
    "not text": b"\x80\x81\x82",
    "empty": "",
    "a list": "[]",
    "a number": "7",
    "nothing": "null",
    "too deep": "[" * 100_000,
    "without data": json.dumps({"format": "pegasus_vae choices 2"}),
    "truncated": None,
    "a word for an index": {"horse": [7, "four"]},
    "a number for a list": {"bird": 5},
    "a list for best": {"best": [1]},
    "an unknown part": {"colour": "white"},
    "a word for a horse": {"compositions": {"seven": {"bird": 1}}},
    "a composition out of range": {"compositions": {"7": {"bird": 1, "scale": 7}}},
    "a ragged grid": {"compositions": {"7": {"bird": 1, "cells": [*["." * 8] * 7, "."]}}},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_set_aside_and_the_shipped_choices_are_used(picks, open_picks, path, shipped, content):
    shipped.write_bytes(path.read_bytes())
    if isinstance(content, dict):
        edit(path, **content)
    else:
        content = path.read_bytes()[:-40] if content is None else content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = path.read_bytes()
    again = open_picks()
    (aside,) = path.parent.glob("picks.bad-*.json")
    assert aside.read_bytes() == before and not path.exists()
    assert state(again) == BEFORE and again.origin == "shipped"
    assert len(again.notes) == 1 and aside.name in again.notes[0]
    again.change("horse", 0, True)
    assert open_picks()["horse"] == [7, 2, 9, 0] and aside.read_bytes() == before


UNFIT = {
    "a horse beyond the end": {"horse": [7, 12, 2, 9]},
    "a negative horse": {"horse": [7, 2, -1, 9]},
    "a horse that comes twice": {"horse": [7, 2, 7, 9]},
    "a bird beyond the end": {"bird": [5, 3, 12]},
    "a mark on a bird that is not picked": {"dark": [0, 5]},
    "a mark on a bird beyond the end": {"bird": [5, 3, 12], "dark": [5, 12]},
    "a composition of no horse": {"compositions": {"12": {"bird": 5}}},
    "a composition with no bird": {"compositions": {"2": {"bird": 12}}},
}


@pytest.mark.parametrize("parts", UNFIT.values(), ids=UNFIT)
def test_what_fits_no_candidate_is_left_out_and_reported_and_the_rest_is_kept(picks, open_picks, path, parts):
    before = json.loads(path.read_text())
    edit(path, **{part: before[part] | of if isinstance(of, dict) else of for part, of in parts.items()})
    before = path.read_bytes()
    again = open_picks()
    assert state(again) == BEFORE and len(again.notes) == len(parts)
    assert all(part in note for part, note in zip(parts, again.notes))
    assert path.read_bytes() == before, "looking writes nothing"
    again.change("horse", 0, True)
    assert open_picks().notes == [] and open_picks().choices == again.choices


def test_a_best_that_is_not_in_the_batch_is_not_shown(picks, open_picks, path):
    ((batch, _),) = json.loads(path.read_text())["best"].items()
    edit(path, best={batch: [9, -1, 1]})
    assert state(open_picks()) == BEFORE


FOREIGN = {
    "the former picks": ({"schema": "pegasus_vae picks", "version": 1}, "is of another version,"),
    "a later version": ({"format": "pegasus_vae choices 3", "horses": {}}, "is pegasus_vae choices 3,"),
    "something else": ({"format": "recipes", "soups": 12}, "is recipes,"),
}


@pytest.mark.parametrize("content, message", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_version_is_refused_in_a_line_and_left_alone(pv, open_picks, path, shipped, content, message):
    for file in (shipped, path):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
        with pytest.raises(pv.ReaderError) as refusal:
            open_picks()
        assert message in str(refusal.value) and "reads pegasus_vae choices 2: move it away" in str(refusal.value)
        assert str(refusal.value).startswith(str(file)) and "\n" not in str(refusal.value)
        assert json.loads(file.read_text()) == content and list(file.parent.glob("*.bad-*")) == []
        file.unlink()


@pytest.mark.parametrize("other", [{"horses": HORSES[::-1]}, {"birds": BIRDS[:-1]}], ids=["order", "number"])
def test_a_file_of_other_data_is_refused_with_both_named_and_left_alone(pv, picks, open_picks, path, other):
    before = path.read_bytes()
    with pytest.raises(pv.ReaderError, match="made on other data") as refusal:
        open_picks(**other)
    ours = open_picks(path=path.with_name("new.json"), **other).data
    assert picks.data in str(refusal.value) and ours in str(refusal.value) and ours != picks.data
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_read_is_refused(pv, open_picks, path):
    path.mkdir(parents=True)
    with pytest.raises(pv.ReaderError, match="cannot be read .*: mend or move it"):
        open_picks()


# the shipped file, suggestions, the batch


def test_shipped_choices_of_other_data_are_not_used(picks, open_picks, path, shipped):
    path.rename(shipped)
    other = open_picks(horses=HORSES[::-1])
    assert state(other) == NOTHING and other.origin == "none" and other.notes == []


def test_a_damaged_shipped_file_is_not_used_left_alone_and_reported(open_picks, shipped):
    assert open_picks().notes == []  # none is there
    shipped.write_text("{")
    picks = open_picks()
    assert state(picks) == NOTHING and picks.origin == "none"
    assert [note for note in picks.notes if str(shipped) in note and "damaged" in note] == picks.notes != []
    assert shipped.read_text() == "{"


def test_shipped_picks_are_cut_to_the_target_and_the_marks_with_them(picks, open_picks, path, shipped):
    picks.change("dark", 3, True)
    path.rename(shipped)
    reader = open_picks(target=1)
    assert state(reader) == BEFORE | {"horse": [7], "bird": [5], "best": []}
    reader.require()
    reader.change("best", 0, True)
    reader.require()
    assert reader["best"] == open_picks(target=1)["best"] == [0] and reader.notes == []


def test_suggestions_are_nobodys_picks_until_one_is_changed(open_picks, path):
    picks = open_picks()
    picks.fill("horse", [4, 7, 1, 2, 3], save=False)
    picks.fill("bird", torch.tensor([9, 8, 7, 6, 5]), save=False)
    assert state(picks) == NOTHING | {"horse": [4, 7, 1, 2], "bird": [9, 8, 7, 6]}
    assert picks.origin == "suggested" and not path.exists()
    picks.change("horse", 4, False)
    assert picks.origin == "your own" and open_picks()["horse"] == [7, 1, 2]


def test_a_full_group_is_not_filled_and_a_filling_is_one_step_for_undo(picks):
    picks.fill("horse", [7, 4, 1, 0])
    assert picks["horse"] == [7, 2, 9, 4]
    picks.fill("horse", range(12))
    picks.fill("bird", range(12))
    assert picks["bird"] == [5, 3, 0, 1]
    picks.undo()
    assert state(picks) == BEFORE | {"horse": [7, 2, 9, 4]}
    picks.undo()
    assert state(picks) == BEFORE


@pytest.mark.parametrize("trouble", [True, False])
def test_choices_that_were_changed_are_not_called_shipped_though_the_disk_is_full(
    pv, picks, open_picks, path, shipped, monkeypatch, trouble
):
    path.rename(shipped)
    reader = open_picks()
    if trouble:
        fill_the_disk(path, monkeypatch, pv)
    reader.change("horse", 0, True)
    assert bool(reader.failure) == trouble and reader.origin == "your own"


def test_enough_picks_are_handed_over_as_they_are_in_the_file_now(picks, open_picks):
    picks.change("horse", 0, True)
    picks.fill("bird", [3, 8, 5, 1])
    horses, birds, dark_winged = picks.require()
    assert (horses, birds, dark_winged.tolist()) == ([7, 2, 9, 0], [5, 3, 8, 1], [True, False, False, False])
    open_picks().change("dark", 8, True)
    assert picks.require()[2].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    "horses, birds, message",
    [
        ([], [0, 1], "3 of 4 horses picked: pick 1 more"),
        ([0], [], "2 of 4 birds picked: pick 2 more"),
        ([0], [0, 1, 2, 4], "6 of 4 birds picked: remove 2"),
    ],
)
def test_too_few_and_too_many_picks_are_refused_with_what_to_do(pv, picks, horses, birds, message):
    for group, indices in (("horse", horses), ("bird", birds)):
        for index in indices:
            picks.change(group, index, True)
    with pytest.raises(pv.ReaderError, match=f"{message} in the picker"):
        picks.require()


def test_the_latest_three_are_the_best(picks, open_picks):
    for best in (3, 0, 2):
        picks.change("best", best, True)
    assert picks["best"] == open_picks()["best"] == [3, 0, 2]
    picks.change("best", 0, False)
    assert picks["best"] == open_picks()["best"] == [3, 2]


def test_the_best_are_remembered_for_the_batch_on_the_screen(picks, open_picks):
    picks.change("horse", 0, True)
    picks.fill("bird", [8, 1])
    picks.require()  # a batch of other parents is drawn
    assert picks["best"] == []
    picks.change("best", 2, True)
    picks.change("dark", 3, True)  # and not drawn again
    picks.change("best", 0, True)
    assert picks["best"] == [2, 0]
    picks.require()
    assert picks["best"] == open_picks()["best"] == []
    picks.change("dark", 3, False)
    picks.require()
    assert picks["best"] == open_picks()["best"] == [2, 0]


def test_the_best_are_remembered_for_the_weights_that_made_them(picks, open_picks):
    two = open_picks(maker="two")
    assert state(two) == BEFORE | {"best": []}
    two.change("best", 3, True)
    assert open_picks(maker="one")["best"] == [1] and open_picks(maker="two")["best"] == [3]
