"""The code of docs/operators.md runs as it stands, and prints what the page says that it prints."""

import re
from pathlib import Path

from tests.own_operators import own_rules

PAGE = Path(__file__).parent.parent / "docs" / "operators.md"
BLOCK = re.compile(r"^```(python)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_code_of_the_page_runs_and_prints_what_it_says(capsys, monkeypatch):
    monkeypatch.chdir(PAGE.parent.parent)
    source, scope = PAGE.read_text(), dict[str, object]()
    with own_rules():
        for match in BLOCK.finditer(source):
            language, text = match.groups()
            if language:
                padding = "\n" * source[: match.start(2)].count("\n")  # so that a location is the page's
                capsys.readouterr()
                exec(compile(padding + text, str(PAGE), "exec"), scope)
            else:
                assert capsys.readouterr().out.strip() == text.strip()
