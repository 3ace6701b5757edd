"""The pages of docs/ run as they stand, and the tests that they show pass."""

import inspect
from pathlib import Path

from tests.markdown import blocks, run_page

PAGE = Path(__file__).parent.parent / "docs" / "testing.md"
EXPERTS = PAGE.parent / "experts.md"


def test_the_page_on_testing_runs_and_the_tests_that_it_shows_pass(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(PAGE.parent.parent)
    scope = run_page(PAGE, capsys)
    shown = {name: item for name, item in scope.items() if name.startswith("test_")}
    assert len(shown) == 4
    for test in shown.values():
        test(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_the_page_on_experts_runs_and_every_mistake_is_told_as_it_says(capsys, monkeypatch):
    monkeypatch.chdir(EXPERTS.parent.parent)
    run_page(EXPERTS, capsys)


def test_a_table_is_property_tested_in_ten_lines():
    (shown,) = (text for _, text in blocks(PAGE) if "@given(mesh=" in text)
    assert len([line for line in shown.splitlines() if line.strip()]) <= 10
