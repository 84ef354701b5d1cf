"""The pickers in a real browser: our notebook in smoke mode, in JupyterLab and in Notebook 7."""

import json
import re

import pytest

import browser
from browser import Jupyter, Notebook, until
from conftest import draw_stl10

pytestmark = pytest.mark.skipif(
    browser.CHROMIUM is None, reason="no Chromium: apt-get install chromium, and the browser tests run"
)


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory):
    """A server whose kernels see 60 horses and 60 birds, so that there are two pages of them."""
    folder = tmp_path_factory.mktemp("jupyter")
    draw_stl10(folder / "data", test_animals=60)
    outputs = {"PEGASUS_OUTPUT_DIR": str(folder / "outputs"), "PEGASUS_CHECKPOINT_DIR": str(folder / "checkpoints")}
    (folder / "server").mkdir()
    jupyter = Jupyter(folder / "server", PEGASUS_DATA_DIR=str(folder / "data"), **outputs)
    yield jupyter
    jupyter.close()


@pytest.fixture(scope="module", params=["lab", "notebooks"])
def notebook(request, jupyter, chromium):
    """The notebook, all cells run; the second one resumes the finished training of the first."""
    outputs = jupyter.folder.parent / "outputs"
    for kept in ("picks.json", "compositions.json"):
        (outputs / kept).unlink(missing_ok=True)
    notebook = Notebook(jupyter, chromium, request.param, outputs)
    notebook.run_all()
    yield notebook
    notebook.page.close()


@pytest.fixture
def picks(notebook):
    """picks(): the content of the reader's picks file, None as long as there is none."""
    path = notebook.outputs / "picks.json"
    return lambda: json.loads(path.read_text()) if path.exists() else None


def picked(content, group):
    return [entry["index"] for entry in content[group]] if content else None


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
    assert "suggested picks" in status(horses) and picks() is None
    chosen = ticked(horses)
    assert len(chosen) == 16
    box(horses, chosen[3]).click()
    until(lambda: picked(picks(), "horse") == chosen[:3] + chosen[4:], "the unpicked horse leaves the file")
    picture = horses.locator(".pegasus-cell").nth(numbers(horses).index(chosen[3])).locator("img")
    place = picture.bounding_box()
    notebook.page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 3)
    until(lambda: picked(picks(), "horse") == chosen[:3] + chosen[4:] + [chosen[3]], "the horse is picked again")
    assert box(horses, chosen[3]).is_checked()
    until(lambda: "16 of 16 horses picked" in status(horses) and "your own picks, saved" in status(horses), "status")


def test_the_keyboard_reaches_every_control_with_a_visible_focus_and_space_picks(notebook, picks):
    horses, page = notebook.picker("horse"), notebook.page
    horses.get_by_role("button", name="Previous").focus()
    focused = "document.activeElement"
    style = f"getComputedStyle({focused}.closest('.pegasus-cell') ?? {focused})"
    names = []
    for _ in range(6 + 2):
        names.append(page.evaluate(f"({focused}.labels[0] ?? {focused}).innerText").strip())
        page.keyboard.press("Tab")
        assert page.evaluate(f"{style}.outlineStyle == 'dashed' && parseFloat({style}.outlineWidth) >= 3"), names
    first, second, third = numbers(horses)[:3]
    assert names == ["Previous", "Next", "Undo", "Suggest", "Sort", "Show", f"#{first}", f"#{second}"]
    before = box(horses, third).is_checked()
    page.keyboard.press("Space")
    until(lambda: (third in picked(picks(), "horse")) is not before, "Space picks")
    page.keyboard.press("Space")
    until(lambda: (third in picked(picks(), "horse")) is before, "Space unpicks")


def test_undo_takes_back_the_last_change_on_page_and_in_file(notebook, picks):
    horses, before = notebook.picker("horse"), picks()
    number = ticked(horses)[0]
    box(horses, number).click()
    until(lambda: number not in picked(picks(), "horse"), "unpicked")
    press(horses, "Undo")
    until(lambda: picks() == before, "the file is as it was")
    until(lambda: box(horses, number).is_checked(), "the box is ticked again")


def test_pages_turn_orders_change_and_the_filter_shows_the_picked(notebook, picks):
    birds = notebook.picker("bird")
    first = numbers(birds)
    assert len(first) == 40 and "page 1 of 2" in status(birds)
    press(birds, "Next")
    until(lambda: "page 2 of 2" in status(birds) and len(numbers(birds)) == 20, "the second page")
    assert set(numbers(birds)) == set(range(60)) - set(first)
    choose(birds, "Sort", "file order")
    until(lambda: numbers(birds) == list(range(40)), "file order, from the first page")
    choose(birds, "Show", "picked")
    until(lambda: sorted(numbers(birds)) == sorted(picked(picks(), "bird")), "the picked only")
    choose(birds, "Show", "not picked")
    until(lambda: len(numbers(birds)) == 40 and not ticked(birds), "the others only")
    choose(birds, "Show", "all")
    choose(birds, "Sort", "most like my picks")
    until(lambda: numbers(birds) != list(range(40)) and len(numbers(birds)) == 40, "by their codes")
    choose(birds, "Sort", "widest first")
    until(lambda: numbers(birds) == first, "the first order")


def test_suggest_fills_what_is_missing(notebook, picks):
    birds = notebook.picker("bird")
    missing = picked(picks(), "bird")[:3]
    for number in missing:
        box(birds, number).click()
    until(lambda: len(picked(picks(), "bird")) == 13, "three are unpicked")
    until(lambda: "13 of 16 birds picked" in status(birds), "the status counts")
    press(birds, "Suggest")
    until(lambda: picked(picks(), "bird")[13:] == missing, "the first of the order are back")


def test_a_click_in_the_same_instant_as_next_marks_the_picture_that_was_seen(notebook, picks):
    birds = notebook.picker("bird")
    number = next(number for number in numbers(birds) if number not in picked(picks(), "bird"))
    following = birds.get_by_role("button", name="Next").element_handle()
    box(birds, number).evaluate("(box, next) => { next.click(); box.click(); }", following)
    until(lambda: picked(picks(), "bird")[-1] == number, "the picture that was seen is picked")
    until(lambda: "page 2 of 2" in status(birds), "and the page has turned")
    press(birds, "Previous")
    until(lambda: number in numbers(birds) and box(birds, number).is_checked(), "ticked when it is seen again")
    press(birds, "Undo")
    until(lambda: number not in picked(picks(), "bird"), "undone")


def test_a_bird_and_its_negative_stand_side_by_side_and_its_mark_goes_with_it(notebook, picks):
    number = picked(picks(), "bird")[0]
    dark = notebook.picker("dark")
    assert numbers(dark) and set(numbers(dark)) <= set(picked(picks(), "bird"))
    shape = dark.locator("img").first.bounding_box()
    assert shape["width"] == pytest.approx(2 * shape["height"], rel=0.05)
    choose(dark, "Sort", "file order")
    until(lambda: number in numbers(dark), "the bird is shown")
    box(dark, number).click()
    until(lambda: {"dark": True}.items() <= picks()["bird"][0].items(), "marked")
    until(lambda: "1 bird marked" in status(dark), "counted")
    birds = notebook.picker("bird")
    choose(birds, "Sort", "file order")
    until(lambda: numbers(birds)[:1] == [0], "in file order")
    if number not in numbers(birds):
        press(birds, "Next")
    until(lambda: number in numbers(birds), "the bird is on the page")
    box(birds, number).click()
    until(lambda: number not in picked(picks(), "bird") and '"dark"' not in json.dumps(picks()), "the mark is gone")
    press(birds, "Undo")
    until(lambda: picks()["bird"][0] == picks()["bird"][0] | {"index": number, "dark": True}, "both are back")


def test_the_best_is_written_at_once_and_there_are_three_at_most(notebook, picks):
    notebook.run_below()  # since the batch was drawn, other tests have changed its parents
    best = notebook.picker("best")
    assert len(numbers(best)) == 16
    image = notebook.outputs / "best.png"
    for numbers_now in ([5], [5, 9], [5, 9, 2], [9, 2, 7]):
        before = image.stat().st_mtime_ns
        box(best, numbers_now[-1]).click()
        until(lambda: [entry["indices"] for entry in (picks() or {})["best"].values()] == [numbers_now], "in the file")  # noqa: B023
        until(lambda: image.stat().st_mtime_ns != before, "best.png follows")  # noqa: B023
        until(lambda: ticked(best) == sorted(numbers_now), "these and no others")  # noqa: B023


def test_own_picks_change_what_follows_and_the_notebook_says_so(notebook, picks):
    horses = notebook.picker("horse")
    sheet = notebook.outputs / "horses.png"
    before = sheet.read_bytes()
    box(horses, picked(picks(), "horse")[0]).click()
    new = next(number for number in numbers(horses) if number not in picked(picks(), "horse"))
    box(horses, new).click()
    until(lambda: picked(picks(), "horse")[-1] == new, "another horse")
    notebook.run_below()
    assert sheet.read_bytes() != before
    said = notebook.page.locator(".jp-OutputArea-output").filter(has_text="your own picks: 16 horses, 16 birds")
    until(lambda: said.count(), "the notebook says whose picks are in use")
    press(horses, "Undo")
    press(horses, "Undo")


@pytest.fixture
def compositions(notebook):
    """compositions(): {horse: composition} in the reader's file."""
    path = notebook.outputs / "compositions.json"

    def compositions():
        return {c["horse"]: c for c in json.loads(path.read_text())["compositions"]} if path.exists() else {}

    return compositions


def horse_of(composer):
    return int(re.search(r"#(\d+)", status(composer))[1])


def pegasus(composer):
    """What the picture of the pegasus shows; its address is a new one each time."""
    draw = "c.getContext('2d').drawImage(i, 0, 0, 64, 64)"
    canvas = "const c = Object.assign(document.createElement('canvas'), { width: 64, height: 64 })"
    return composer.locator("img").last.evaluate(
        f"async i => {{ await i.decode(); {canvas}; {draw}; return c.toDataURL() }}"
    )


def test_a_click_on_a_cell_of_the_horse_takes_it_from_the_bird_and_the_pegasus_follows(notebook, compositions):
    composer = notebook.picker("composer")
    assert compositions() == {} and "first guess" in status(composer)
    horse, before = horse_of(composer), pegasus(composer)
    press(composer, "Clear")
    until(lambda: horse in compositions() and "#" not in "".join(compositions()[horse]["cells"]), "cleared")
    until(lambda: pegasus(composer) != before, "the horse alone")
    alone = pegasus(composer)
    picture = composer.locator("img").first.bounding_box()
    notebook.page.mouse.click(picture["x"] + picture["width"] * 2.5 / 8, picture["y"] + picture["height"] * 4.5 / 8)
    until(lambda: compositions()[horse]["cells"][4] == "..#.....", "row 5, column 3")
    until(lambda: pegasus(composer) != alone, "the pegasus follows")
    tick = composer.get_by_role("checkbox", name="row 5, column 3", exact=True)
    assert tick.is_checked() and composer.get_by_role("checkbox", name=re.compile("^row"), checked=True).count() == 1
    press(composer, "Undo")
    until(lambda: not tick.is_checked() and pegasus(composer) == alone, "undone")


def test_sliders_boxes_and_the_bird_change_the_composition_by_keyboard_too(notebook, compositions, picks):
    composer, page = notebook.picker("composer"), notebook.page
    horse = horse_of(composer)
    cell = composer.get_by_role("checkbox", name="row 3, column 2", exact=True)
    cell.focus()
    page.keyboard.press("Space")
    until(lambda: compositions()[horse]["cells"][2][1] == "#", "Space takes a cell")
    page.keyboard.press("Tab")
    outline = cell.evaluate("e => getComputedStyle(document.activeElement.closest('.widget-checkbox')).outlineStyle")
    assert outline == "dashed", "the next cell has the focus, and one can see it"
    composer.locator(".widget-readout").nth(1).click()
    page.keyboard.press("Control+A")
    page.keyboard.type("1.25")
    page.keyboard.press("Enter")
    until(lambda: compositions()[horse]["right"] == 1.25, "a number typed beside the slider")
    handle = composer.locator(".noUi-handle").nth(2).bounding_box()
    page.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    page.mouse.down()
    page.mouse.move(handle["x"] + 40, handle["y"] + handle["height"] / 2, steps=4)
    before, drawn = compositions()[horse]["down"], pegasus(composer)
    page.mouse.up()
    until(
        lambda: compositions()[horse]["down"] > before and pegasus(composer) != drawn, "the slider moves the bird down"
    )
    mirror = compositions()[horse]["mirror"]
    composer.get_by_role("checkbox", name="mirror", exact=True).click()
    until(lambda: compositions()[horse]["mirror"] is not mirror, "mirrored")
    other = next(bird for bird in picked(picks(), "bird") if bird != compositions()[horse]["bird"])
    choose(composer, "bird", f"#{other}")
    until(lambda: compositions()[horse]["bird"] == other, "another bird")


def test_each_horse_has_its_own_composition(notebook, compositions):
    composer = notebook.picker("composer")
    first, before = horse_of(composer), compositions()
    press(composer, "Next")
    until(lambda: "horse 2 of 16" in status(composer) and "first guess" in status(composer), "the second horse")
    assert compositions() == before, "looking changes nothing"
    press(composer, "Guess")
    press(composer, "Clear")
    second = horse_of(composer)
    until(lambda: second in compositions(), "it has a composition now")
    assert compositions()[first] == before[first] and first != second
    press(composer, "Previous")
    until(lambda: horse_of(composer) == first and "composed" in status(composer), "the first again")


def test_a_full_disk_shows_not_saved_and_the_next_click_saves_both(notebook, picks):
    horses = notebook.picker("horse")
    one, two = [number for number in numbers(horses) if number not in picked(picks(), "horse")][:2]
    (notebook.outputs / "picks.json.tmp").symlink_to("/dev/full")
    box(horses, one).click()
    until(lambda: "NOT saved" in status(horses) and "No space left on device" in status(horses), "the reader is told")
    assert one not in picked(picks(), "horse") and box(horses, one).is_checked()
    box(horses, two).click()
    until(lambda: picked(picks(), "horse")[-2:] == [one, two], "both are saved")
    until(lambda: "NOT saved" not in status(horses) and "18 of 16 horses picked: remove 2" in status(horses), "status")
    press(horses, "Undo")
    press(horses, "Undo")
    until(lambda: not {one, two} & set(picked(picks(), "horse")), "undone")


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_colour_is_not_the_only_sign_and_words_and_frames_stand_out_in_both_themes(notebook, theme):
    notebook.choose_theme(theme)
    horses = notebook.picker("horse")
    chosen = box(horses, ticked(horses)[0])
    assert chosen.is_checked()  # a tick, besides the frame
    opaque = "e => { while (getComputedStyle(e).backgroundColor == 'rgba(0, 0, 0, 0)') e = e.parentElement; return e }"
    paper = chosen.evaluate(f"e => getComputedStyle(({opaque})(e)).backgroundColor")
    assert (sum(channels(paper)) < 200) == (theme == "Dark")
    frame = chosen.evaluate("e => getComputedStyle(e.closest('.pegasus-cell')).outlineColor")
    words = [horses.get_by_role("status"), horses.locator(".pegasus-cell label").last, horses.get_by_text("Sort")]
    colours = [word.evaluate("e => getComputedStyle(e).color") for word in words]
    notebook.page.keyboard.press("Tab")
    for colour in (frame, *colours):
        assert contrast(colour, paper) >= 4.5, f"{colour} on {paper}"


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
    notebook.page.keyboard.press("Escape")
    notebook.menu("File", "Save Notebook")
    path = notebook.jupyter.folder / notebook.name
    until(lambda: "widget-view" in path.read_text(), "the notebook is saved with its outputs")
    notebook.page.reload()
    notebook.ready()
    horses = notebook.picker("horse")
    until(lambda: ticked(horses), "the boxes are drawn again")
    number = ticked(horses)[0]
    box(horses, number).click()
    until(lambda: number not in picked(picks(), "horse"), "a click still reaches the file")


def test_a_restarted_kernel_takes_up_the_picks_of_the_file(notebook, picks):
    notebook.menu("Kernel", "Restart Kernel")
    notebook.page.locator(".jp-Dialog").locator(".jp-mod-accept").click()
    notebook.page.locator(".jp-Dialog").wait_for(state="detached")
    content = picks()
    content["horse"] = content["horse"][:13]  # as no picker has shown it yet
    (notebook.outputs / "picks.json").write_text(json.dumps(content))
    notebook.menu("Run", "Run All Cells")
    horses = notebook.picker("horse")
    until(lambda: "13 of 16 horses picked" in status(horses) and "your own picks" in status(horses), "resumed", 90)
    assert picks() == content
    press(horses, "Suggest")
    until(lambda: len(picked(picks(), "horse")) == 16, "and can be changed")
