"""The code of a page of documentation, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest

BLOCK = re.compile(r"^```(python)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, in order."""
    return BLOCK.findall(page.read_text())


def run_page(page: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run every block of Python in one scope, and compare what it prints with the plain block behind it.

    Code stands on its own lines of the page, so that a rule's location is the page's.
    """
    scope: dict[str, Any] = {}
    source = page.read_text()
    for match in BLOCK.finditer(source):
        language, text = match.groups()
        if language:
            padding = "\n" * source[: match.start(2)].count("\n")
            capsys.readouterr()
            exec(compile(padding + text, str(page), "exec"), scope)
        else:
            assert capsys.readouterr().out.strip() == text.strip()
    return scope
