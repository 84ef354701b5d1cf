"""The faults that tests/tools/mutants.py plants: each still fits the text."""

import pytest

from tools.mutants import MUTANTS, ROOT, UNIT_TESTS, plant


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_fits_one_place_changes_it_and_compiles(name):
    text = (ROOT / "pegasus_vae.py").read_text()
    old, new = MUTANTS[name]
    assert text.count(old) == 1 and new != old
    compile(plant(name), name, "exec")


def test_the_files_that_are_to_catch_them_are_there():
    assert [file for file in UNIT_TESTS if not (ROOT / file).exists()] == []
