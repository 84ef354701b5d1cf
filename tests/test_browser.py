"""The pickers in a real browser: our notebook in smoke mode, in JupyterLab and in Notebook 7."""

import json
import re

import pytest

import browser
from browser import Jupyter, Notebook, until
from conftest import draw_stl10

PICKS = 12

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium: apt-get install chromium, and the browser tests run"
)


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """A server whose kernels see 54 horses and 54 birds, two pages of them, also without the 12 picks, and train for one step."""
    folder = tmp_path_factory.mktemp("jupyter")
    draw_stl10(folder / "data", test_animals=54)
    (folder / "server").mkdir()
    folders = {f"PEGASUS_{kind.upper()}_DIR": str(folder / f"{kind}s") for kind in ("output", "checkpoint")}
    less = {"PEGASUS_BASE_CHANNELS": "4", "PEGASUS_EPOCHS": "1", "PEGASUS_MAX_IMAGES": "20"}
    less["PEGASUS_PICKS_PER_CLASS"] = str(PICKS)
    jupyter = Jupyter(folder / "server", PEGASUS_DATA_DIR=str(folder / "data"), **folders, **less)
    yield jupyter
    jupyter.close()


@pytest.fixture(scope="module")
def open_notebook(jupyter, chromium):
    """open_notebook(interface): the notebook there, opened and run, with picks of nobody, when it is first asked for.

    The second one resumes the finished training of the first.
    """
    outputs, opened = jupyter.folder.parent / "outputs", {}

    def open_notebook(interface):
        if interface not in opened:
            (outputs / "picks.json").unlink(missing_ok=True)
            opened[interface] = Notebook(jupyter, chromium, interface, outputs)
            opened[interface].run_all()
        return opened[interface]

    return open_notebook


@pytest.fixture(scope="module", params=["lab", "notebooks"])
def notebook(request, open_notebook):
    return open_notebook(request.param)


@pytest.fixture
def picks(jupyter):
    """picks(): the content of the reader's file, None as long as there is none."""
    path = jupyter.folder.parent / "outputs" / "picks.json"
    return lambda: json.loads(path.read_text()) if path.exists() else None


def cells(picker):
    """[number, ticked] of the pictures on the page, in the order in which they stand."""
    drawn = "cells.filter(cell => cell.textContent.includes('#'))"  # during a page turn some are not yet
    number_and_tick = "cell => [Number(cell.textContent.match(/#(\\d+)/)[1]), cell.querySelector('input').checked]"
    return picker.locator(".pegasus-cell").evaluate_all(f"cells => {drawn}.map({number_and_tick})")


def numbers(picker):
    return [number for number, _ in cells(picker)]


def ticked(picker):
    return [number for number, is_ticked in cells(picker) if is_ticked]


def box(picker, number):
    return picker.get_by_role("checkbox", name=f"#{number}", exact=True)


def press(picker, name):
    picker.get_by_role("button", name=name, exact=True).click()


def status(picker):
    return picker.get_by_role("status").inner_text()


def choose(picker, name, option):
    picker.get_by_role("combobox", name=name).select_option(option)


def test_a_click_on_the_box_and_a_click_on_the_picture_pick(notebook, picks):
    horses = notebook.picker("horse")
    until(lambda: "suggested choices" in status(horses) and len(ticked(horses)) == PICKS, "suggestions")
    assert picks() is None
    chosen = ticked(horses)
    box(horses, chosen[3]).click()
    until(lambda: picks()["horse"] == chosen[:3] + chosen[4:], "the unpicked horse leaves the file")
    cell = horses.locator(".pegasus-cell").nth(numbers(horses).index(chosen[3]))
    on_picture = "i => i.naturalWidth && { x: i.offsetLeft + i.width / 2, y: i.offsetTop + i.height / 3 }"
    place = until(lambda: cell.locator("img").evaluate(on_picture), "the picture is drawn")
    cell.click(position=place)
    until(lambda: picks()["horse"] == chosen[:3] + chosen[4:] + [chosen[3]], "the horse is picked again")
    until(lambda: box(horses, chosen[3]).is_checked(), "its box is ticked")
    counted = f"{PICKS} of {PICKS} horses picked"
    until(lambda: counted in status(horses) and "your own choices, saved" in status(horses), "status")


def test_the_keyboard_reaches_every_control_with_a_visible_focus_and_space_picks(notebook, picks):
    horses, page = notebook.picker("horse"), notebook.page
    focused = "document.activeElement"
    style = f"getComputedStyle({focused}.closest('.pegasus-cell') ?? {focused})"
    visible = f"{style}.outlineStyle == 'dashed' && parseFloat({style}.outlineWidth) >= 3"
    name = f"({focused}.labels?.[0] ?? {focused}).innerText.trim()"
    first, second, third = until(lambda: numbers(horses)[:3], "the pictures are drawn")
    names = ["Previous", "Next", "Undo", "Suggest", "Sort", "Show", f"#{first}", f"#{second}", f"#{third}"]
    horses.get_by_role("button", name="Previous").focus()
    until(lambda: page.evaluate(name) == names[0], "the first has the focus")
    for following in names[1:]:
        page.keyboard.press("Tab")
        until(lambda: page.evaluate(name) == following, f"Tab leads to {following}")  # noqa: B023
        until(lambda: page.evaluate(visible), f"one can see that {following} has the focus")
    before = third in ticked(horses)
    box(horses, third).press("Space")
    until(lambda: (third in picks()["horse"]) is not before, "Space picks")
    box(horses, third).press("Space")
    until(lambda: (third in picks()["horse"]) is before, "Space unpicks")
    until(lambda: (third in ticked(horses)) is before, "and the box follows")


def test_undo_takes_back_the_last_change_on_page_and_in_file(notebook, picks):
    horses, before = notebook.picker("horse"), picks()
    number = until(lambda: ticked(horses), "the pictures are drawn")[0]
    box(horses, number).click()
    until(lambda: number not in picks()["horse"], "unpicked")
    press(horses, "Undo")
    until(lambda: picks() == before, "the file is as it was")
    until(lambda: box(horses, number).is_checked(), "the box is ticked again")


def test_pages_turn_orders_change_and_the_filter_shows_the_picked(notebook, picks):
    birds = notebook.picker("bird")
    until(lambda: len(numbers(birds)) == 40 and "page 1 of 2" in status(birds), "the first page")
    first = numbers(birds)
    press(birds, "Next")
    until(lambda: set(numbers(birds)) == set(range(54)) - set(first), "the other birds")
    until(lambda: "page 2 of 2" in status(birds), "the second page")
    choose(birds, "Sort", "file order")
    until(lambda: numbers(birds) == list(range(40)), "file order, from the first page")
    choose(birds, "Show", "picked")
    until(lambda: sorted(numbers(birds)) == sorted(picks()["bird"]), "the picked only")
    choose(birds, "Show", "not picked")
    until(lambda: len(numbers(birds)) == 40 and not ticked(birds), "the others only")
    choose(birds, "Show", "all")
    until(lambda: numbers(birds) == list(range(40)), "all again")
    choose(birds, "Sort", "most like my picks")
    until(lambda: numbers(birds) != list(range(40)) and len(numbers(birds)) == 40, "by their codes")
    choose(birds, "Sort", "widest first")
    until(lambda: numbers(birds) == first, "the first order")


def test_suggest_fills_what_is_missing(notebook, picks):
    birds = notebook.picker("bird")
    missing = picks()["bird"][:3]
    for number in missing:
        box(birds, number).click()
    until(lambda: len(picks()["bird"]) == PICKS - 3, "three are unpicked")
    until(lambda: f"{PICKS - 3} of {PICKS} birds picked" in status(birds), "the status counts")
    press(birds, "Suggest")
    until(lambda: picks()["bird"][-3:] == missing, "the first of the order are back")
    until(lambda: set(missing) <= set(ticked(birds)), "and ticked")


def test_a_click_in_the_same_instant_as_next_marks_the_picture_that_was_seen(notebook, picks):
    birds = notebook.picker("bird")
    number = until(lambda: [n for n in numbers(birds) if n not in picks()["bird"]], "pictures that are not picked")[0]
    following = birds.get_by_role("button", name="Next").element_handle()
    box(birds, number).evaluate("(box, next) => { next.click(); box.click(); }", following)
    until(lambda: picks()["bird"][-1] == number, "the picture that was seen is picked")
    until(lambda: "page 2 of 2" in status(birds), "and the page has turned")
    press(birds, "Previous")
    until(lambda: number in numbers(birds) and box(birds, number).is_checked(), "ticked when it is seen again")
    press(birds, "Undo")
    until(lambda: number not in picks()["bird"], "undone")


def test_a_bird_and_its_negative_stand_side_by_side_and_its_mark_goes_with_it(notebook, picks):
    number = picks()["bird"][0]
    dark = notebook.picker("dark")
    until(lambda: sorted(numbers(dark)) == sorted(picks()["bird"]), "the picked birds")
    twice = "i => i.complete && i.naturalWidth == 2 * i.naturalHeight && Math.abs(i.width / i.height - 2) < 0.1"
    until(lambda: dark.locator("img").first.evaluate(twice), "two pictures side by side")
    choose(dark, "Sort", "file order")
    until(lambda: numbers(dark) == sorted(picks()["bird"]), "in file order")
    box(dark, number).click()
    until(lambda: picks()["dark"] == [number], "marked")
    until(lambda: "1 marked as dark-winged" in status(dark), "counted")
    birds = notebook.picker("bird")
    until(lambda: number in ticked(birds), "the bird is on the page")
    box(birds, number).click()
    until(lambda: number not in picks()["bird"] and picks()["dark"] == [], "the mark is gone")
    press(birds, "Undo")
    until(lambda: picks()["bird"][0] == number and picks()["dark"] == [number], "both are back")


def test_own_picks_change_what_follows_and_the_notebook_says_so(notebook, picks):
    horses = notebook.picker("horse")
    sheet, before = notebook.outputs / "horses.png", picks()["horse"]
    drawn = sheet.read_bytes()
    until(lambda: set(before) <= set(ticked(horses)), "the picker is drawn")
    box(horses, before[0]).click()
    until(lambda: picks()["horse"] == before[1:], "one horse less")
    new = next(number for number in numbers(horses) if number not in before)
    box(horses, new).click()
    until(lambda: picks()["horse"] == [*before[1:], new], "another horse")
    notebook.run_below()
    assert sheet.read_bytes() != drawn
    said = notebook.page.locator(".jp-OutputArea-output")
    said = said.filter(has_text=f"your own picks: {PICKS} horses, {PICKS} birds, 1 with dark wings")
    until(said.count, "the notebook says whose picks are in use")


def test_the_best_is_written_at_once_and_there_are_three_at_most(notebook, picks):
    best = notebook.picker("best")
    until(lambda: len(numbers(best)) == PICKS and not ticked(best), "the batch, none picked")
    image = notebook.outputs / "best.png"
    for now in ([5], [5, 9], [5, 9, 2], [9, 2, 7]):
        before = image.stat().st_mtime_ns
        box(best, now[-1]).click()
        until(lambda: list(picks()["best"].values()) == [now], "in the file")  # noqa: B023
        until(lambda: image.stat().st_mtime_ns != before, "best.png follows")  # noqa: B023
        until(lambda: ticked(best) == sorted(now), "these and no others")  # noqa: B023


@pytest.fixture
def composition(notebook, picks):
    """composition(): the one of the reader's file for the horse that the composer shows."""
    composer = notebook.picker("composer")
    return lambda: picks()["compositions"][str(horse_of(composer))]


def horse_of(composer):
    return int(re.search(r"#(\d+)", status(composer))[1])


def shown(composer, name):
    """What the picture of "horse", "bird" or "pegasus" shows, when it is drawn; its address is a new one each time."""
    position = ("horse", "bird", "pegasus").index(name)
    draw = "c.getContext('2d').drawImage(i, 0, 0, 64, 64)"
    canvas = "const c = Object.assign(document.createElement('canvas'), { width: 64, height: 64 })"
    picture = composer.locator("img").nth(position)
    code = f"async i => {{ await i.decode(); {canvas}; {draw}; return c.toDataURL() }}"
    return until(lambda: picture.evaluate(code), f"the picture of the {name} is drawn")


def chosen_cells(composer):
    """(row, column) of the blocks that are ticked, counted from 1."""
    ticks = composer.locator(".pegasus-mask input").evaluate_all("boxes => boxes.map(box => box.checked)")
    assert len(ticks) == 64
    return [(index // 8 + 1, index % 8 + 1) for index, is_ticked in enumerate(ticks) if is_ticked]


def test_a_click_on_a_cell_of_the_horse_takes_it_from_the_bird_and_the_pegasus_follows(notebook, composition, picks):
    composer = notebook.picker("composer")
    until(lambda: "first guess" in status(composer), "no composition yet")
    assert not picks() or picks()["compositions"] == {}
    until(lambda: len(chosen_cells(composer)) > 1, "the blocks of the first guess")
    guessed, before = chosen_cells(composer), shown(composer, "pegasus")
    row, column = guessed[len(guessed) // 2]  # the bird is seen there
    press(composer, "Clear")
    until(lambda: composition()["cells"] == ["." * 8] * 8, "cleared")
    until(lambda: chosen_cells(composer) == [] and "composed" in status(composer), "no block is ticked")
    until(lambda: shown(composer, "pegasus") != before, "the horse alone")
    alone = shown(composer, "pegasus")
    mask = composer.locator(".pegasus-mask")
    size = mask.evaluate("e => ({ width: e.clientWidth, height: e.clientHeight })")
    mask.click(position={"x": size["width"] * (column - 0.5) / 8, "y": size["height"] * (row - 0.5) / 8})
    until(lambda: chosen_cells(composer) == [(row, column)], "this block is ticked")
    until(lambda: composition()["cells"][row - 1][column - 1] == "#", "and saved")
    assert "".join(composition()["cells"]).count("#") == 1
    press(composer, "Undo")  # one block changes too little of what the smoke model draws to be seen
    until(lambda: chosen_cells(composer) == [] and shown(composer, "pegasus") == alone, "undone")
    until(lambda: composition()["cells"] == ["." * 8] * 8, "in the file too")
    press(composer, "Guess")
    until(lambda: chosen_cells(composer) == guessed and shown(composer, "pegasus") == before, "the pegasus follows")
    press(composer, "Undo")
    until(lambda: composition()["cells"] == ["." * 8] * 8, "no block in the file")


def test_sliders_boxes_and_the_bird_change_the_composition_by_keyboard_too(notebook, composition, picks):
    composer, page = notebook.picker("composer"), notebook.page
    focus = "e => e.contains(document.activeElement)"

    def slider(name):
        return composer.locator(".widget-hslider").filter(has=page.get_by_text(name, exact=True))

    cell = composer.get_by_role("checkbox", name="row 3, column 2", exact=True)
    cell.press("Space")
    until(lambda: composition()["cells"][2][1] == "#", "Space takes a block")
    cell.press("Tab")
    following = composer.get_by_role("checkbox", name="row 3, column 3", exact=True)
    until(lambda: following.evaluate(focus), "the next block has the focus")
    outline = "e => getComputedStyle(e.closest('.widget-checkbox')).outlineStyle"
    until(lambda: following.evaluate(outline) == "dashed", "and one can see it")

    # a number typed beside a slider; the arrow keys would do in JupyterLab, but Notebook 7 takes them for its own
    for name, value in (("mend", 0.5), ("right", 1.25), ("turn", 30)):
        bird, number = shown(composer, "bird"), slider(name).locator(".widget-readout")
        number.fill(str(value))
        number.press("Enter")
        until(lambda: composition()[name] == value, "the number is saved")  # noqa: B023
        if name != "mend":  # of that the placed bird shows nothing
            until(lambda: shown(composer, "bird") != bird, "the bird is moved or turned")  # noqa: B023

    before, bird = composition()["down"], shown(composer, "bird")
    bar = slider("down").locator(".noUi-target")
    place = bar.evaluate("e => ({ x: 0.6 * e.clientWidth, y: e.clientHeight / 2 })")
    slider("down").locator(".noUi-handle").drag_to(bar, target_position=place)
    until(lambda: composition()["down"] > before, "the slider is dragged")
    until(lambda: shown(composer, "bird") != bird, "the bird is moved down")

    mirror = composition()["mirror"]
    composer.get_by_role("checkbox", name="mirror", exact=True).click()
    until(lambda: composition()["mirror"] is not mirror, "mirrored")
    other = next(bird for bird in picks()["bird"] if bird != composition()["bird"])
    choose(composer, "bird", f"#{other}")
    until(lambda: composition()["bird"] == other, "another bird")


def test_each_horse_has_its_own_composition(notebook, picks):
    composer = notebook.picker("composer")
    first, before = horse_of(composer), picks()["compositions"]
    press(composer, "Next")
    until(lambda: f"horse 2 of {PICKS}" in status(composer) and "first guess" in status(composer), "the second horse")
    second = horse_of(composer)
    assert picks()["compositions"] == before and first != second, "looking changes nothing"
    press(composer, "Guess")
    press(composer, "Clear")
    cleared = {str(second): ["." * 8] * 8}
    until(lambda: {h: c["cells"] for h, c in picks()["compositions"].items() if h not in before} == cleared, "its own")
    assert picks()["compositions"][str(first)] == before[str(first)]
    press(composer, "Previous")
    until(lambda: horse_of(composer) == first and "composed" in status(composer), "the first again")


def test_a_full_disk_shows_not_saved_and_the_next_click_saves_both(notebook, picks):
    horses = notebook.picker("horse")
    one, two = until(lambda: [n for n in numbers(horses) if n not in picks()["horse"]][:2], "the pictures are drawn")
    (notebook.outputs / "picks.json.tmp").symlink_to("/dev/full")
    box(horses, one).click()
    until(lambda: "NOT saved" in status(horses) and "No space left on device" in status(horses), "the reader is told")
    assert one not in picks()["horse"]
    until(lambda: box(horses, one).is_checked(), "it stays on the screen")
    box(horses, two).click()
    until(lambda: picks()["horse"][-2:] == [one, two], "both are saved")
    surplus = f"{PICKS + 2} of {PICKS} horses picked: remove 2"
    until(lambda: "NOT saved" not in status(horses) and surplus in status(horses), "status")
    press(horses, "Undo")
    press(horses, "Undo")
    until(lambda: not {one, two} & set(picks()["horse"]), "undone")


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_colour_is_not_the_only_sign_and_words_and_frames_stand_out_in_both_themes(notebook, theme):
    notebook.choose_theme(theme)
    horses = notebook.picker("horse")
    chosen = until(lambda: ticked(horses), "the picker is drawn")[0]
    chosen = box(horses, chosen)  # a tick, besides the frame
    words = [horses.get_by_role("status"), horses.locator(".pegasus-cell label").last, horses.get_by_text("Sort")]
    opaque = "e => { while (getComputedStyle(e).backgroundColor == 'rgba(0, 0, 0, 0)') e = e.parentElement; return e }"

    def paper():
        return chosen.evaluate(f"e => getComputedStyle(({opaque})(e)).backgroundColor")

    def colours():
        yield chosen.evaluate("e => getComputedStyle(e.closest('.pegasus-cell')).outlineColor")
        for word in words:
            yield word.evaluate("e => getComputedStyle(e).color")

    until(lambda: (sum(channels(paper())) < 200) == (theme == "Dark"), "the paper has the colour of the theme")
    until(lambda: min(contrast(colour, paper()) for colour in colours()) >= 4.5, "frame and words stand out")


def channels(colour):
    """Red, green and blue of rgb(...), 0 to 255."""
    return [float(number) for number in re.findall(r"[\d.]+", colour)[:3]]


def contrast(one, two):
    """Contrast ratio of two colours rgb(...) as WCAG 2 defines it, 1 to 21."""

    def luminance(colour):
        levels = [channel / 255 for channel in channels(colour)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    light, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_reload_of_the_page_keeps_the_picker_alive(notebook, picks):
    path = notebook.jupyter.folder / notebook.name
    before = path.stat().st_mtime_ns
    notebook.menu("File", "Save Notebook")
    until(lambda: path.stat().st_mtime_ns != before and "widget-view" in path.read_text(), "saved with its outputs")
    notebook.page.reload(timeout=300_000)
    notebook.ready()
    horses = notebook.picker("horse")
    number = until(lambda: ticked(horses), "the boxes are drawn again")[0]
    box(horses, number).click()
    until(lambda: number not in picks()["horse"], "a click still reaches the file")
    press(horses, "Undo")
    until(lambda: number in picks()["horse"], "undone")


def test_a_restarted_kernel_takes_up_the_picks_of_the_file(notebook, picks):
    with notebook.page.expect_response(lambda answer: answer.url.split("?")[0].endswith("/restart"), timeout=300_000):
        notebook.menu("Kernel", "Restart Kernel")
        notebook.page.locator(".jp-Dialog .jp-mod-accept").click()
    notebook.ready()
    content = picks()
    content["horse"] = content["horse"][:9]  # as no picker has shown it yet
    (notebook.outputs / "picks.json").write_text(json.dumps(content))
    notebook.run_to(notebook.picker("horse"))
    horses = notebook.picker("horse")
    counted = f"9 of {PICKS} horses picked"
    until(lambda: counted in status(horses) and "your own choices, saved" in status(horses), "resumed")
    assert picks() == content
    press(horses, "Suggest")
    until(lambda: len(picks()["horse"]) == PICKS, "and can be changed")


def test_two_notebooks_on_one_file_keep_the_clicks_of_both_and_show_them(open_notebook, picks):
    pickers = [open_notebook(interface).picker("horse") for interface in ("lab", "notebooks")]
    until(lambda: numbers(pickers[0]) and numbers(pickers[0]) == numbers(pickers[1]), "both show the same page")
    until(picks, "there is a file")
    own = [number for number in numbers(pickers[0]) if number not in picks()["horse"]][:4]
    for turn, number in enumerate(own):
        box(pickers[turn % 2], number).click()
        until(lambda: set(own[: turn + 1]) <= set(picks()["horse"]), "this click and those before")  # noqa: B023
        until(lambda: set(own[: turn + 1]) <= set(ticked(pickers[turn % 2])), "on this page too")  # noqa: B023
