"""What a user is told of each mistake, letter for letter; `python -m tests.errors.update` writes it anew."""

import pytest

from shardspec.catalog import CATALOG
from tests.errors.update import HERE, MISTAKES, rendered


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_as_its_golden_file_says(name):
    told = rendered(name)
    assert told == (HERE / f"{name}.err").read_text()
    assert told.startswith(f"error[{name[:5].upper()}]")


def test_every_code_has_a_golden_file():
    assert {name[:5].upper() for name in MISTAKES} == set(CATALOG)


def test_no_golden_file_is_left_over():
    assert {path.stem for path in HERE.glob("*.err")} == set(MISTAKES)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_message_shows_no_path_of_this_machine_and_no_internal_name(name):
    told = (HERE / f"{name}.err").read_text()
    assert "--> /" not in told
    assert "<value" not in told
    assert " object at 0x" not in told
