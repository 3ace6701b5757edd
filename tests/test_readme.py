"""The README's code runs as it stands, and prints what the README says that it prints."""

from pathlib import Path

from tests.markdown import blocks, run_page

README = Path(__file__).parent.parent / "README.md"


def test_the_code_of_the_readme_runs_and_prints_what_it_says(capsys, monkeypatch):
    monkeypatch.chdir(README.parent)
    run_page(README, capsys)


def test_the_code_of_the_page_on_checkpoints_runs_and_prints_what_it_says(capsys):
    run_page(README.parent / "docs" / "checkpoints.md", capsys)


def test_the_readme_is_short_enough_to_read():
    assert len(README.read_text().splitlines()) < 130


def test_the_table_of_the_readme_is_the_table_of_the_family():
    from models.llama import RULES

    scope: dict[str, object] = {}
    exec(blocks(README)[0][1], scope)
    shown = scope["RULES"]
    assert [(rule.pattern, rule.value) for rule in shown.rules] == [(rule.pattern, rule.value) for rule in RULES.rules]
    assert shown.units == RULES.units
