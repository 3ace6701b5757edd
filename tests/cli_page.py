"""Write the answers in docs/cli.md anew: `python -m tests.cli_page`."""

import os
import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from shardspec.cli import main as command

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
BLOCK = re.compile(r"^```console\n\$ shardspec (.*)\n(?:.*\n)*?```$", re.MULTILINE)


def answered(text: str) -> str:
    """The page with what each of its lines prints, seen from the root of the repository."""
    was = Path.cwd()
    os.chdir(ROOT)
    try:
        return BLOCK.sub(lambda block: f"```console\n$ shardspec {block[1]}\n{answer(block[1])}```", text)
    finally:
        os.chdir(was)


def answer(line: str) -> str:
    """What a line prints, stdout and stderr together."""
    result = CliRunner(catch_exceptions=False).invoke(command, shlex.split(line), prog_name="shardspec")
    return result.output


def main() -> None:
    PAGE.write_text(answered(PAGE.read_text()))


if __name__ == "__main__":
    main()
