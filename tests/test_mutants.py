"""What is run by hand still fits the notebook: the faults that tests/tools/mutants.py plants, and the names used by all."""

import re

import pytest

from tools.mutants import FAULTS, MUTANTS, PARTS, ROOT, plant, unit_tests


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_fits_one_place_changes_it_and_compiles(name):
    text = (ROOT / "pegasus_vae.py").read_text()
    old, new = MUTANTS[name]
    assert text.count(old) == 1 and new != old
    compile(plant(name), name, "exec")


def test_the_files_that_are_to_catch_them_are_there():
    assert [file for file in unit_tests() if not (ROOT / file).exists()] == []


def test_no_two_faults_have_one_name_and_the_tests_of_the_faulty_part_come_first():
    assert len(MUTANTS) == sum(map(len, FAULTS.values()))
    for part, faults in FAULTS.items():
        for name in faults:
            first, *others = unit_tests(name)
            assert first == f"tests/test_{part}.py" and len(others) == len(PARTS) - 1


@pytest.mark.parametrize("tool", [*(ROOT / "tests" / "tools").glob("*.py")], ids=lambda tool: tool.stem)
def test_a_tool_uses_only_what_the_notebook_defines(pv, tool):
    names = set(re.findall(r"\bpv\.(\w+)", tool.read_text()))
    assert sorted(name for name in names if not hasattr(pv, name)) == []
