"""The README's code runs as it stands, and prints what the README says that it prints."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def blocks() -> list[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    return BLOCK.findall(README.read_text())


def test_the_code_of_the_readme_runs_and_prints_what_it_says(blocks, capsys, monkeypatch):
    monkeypatch.chdir(README.parent)
    scope: dict[str, object] = {}
    source = README.read_text()
    for match in BLOCK.finditer(source):
        language, text = match.groups()
        if language:
            # Placed on its own lines of the README, so that a rule's location is the README's.
            padding = "\n" * source[: match.start(2)].count("\n")
            capsys.readouterr()
            exec(compile(padding + text, str(README), "exec"), scope)
        else:
            assert capsys.readouterr().out.strip() == text.strip()


def test_the_readme_is_short_enough_to_read(blocks):
    assert len(README.read_text().splitlines()) < 130


def test_the_table_of_the_readme_is_the_table_of_the_family(blocks):
    from models.llama import RULES

    scope: dict[str, object] = {}
    exec(blocks[0][1], scope)
    shown = scope["RULES"]
    assert [(rule.pattern, rule.value) for rule in shown.rules] == [(rule.pattern, rule.value) for rule in RULES.rules]
    assert shown.units == RULES.units
