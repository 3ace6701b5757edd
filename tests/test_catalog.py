"""The catalog has every code that the source can emit, once; the command line answers without torch."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardspec
from shardspec import catalog
from shardspec.cli import main

ROOT = Path(__file__).parent.parent
CODE = re.compile(r'"(SS\d{3})"')


def emitted() -> dict[str, list[str]]:
    """Code -> the files that emit it."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "shardspec").rglob("*.py")):
        if path.name != "catalog.py":
            for code in sorted(set(CODE.findall(path.read_text()))):
                found.setdefault(code, []).append(path.name)
    return found


def test_every_code_that_the_source_emits_is_in_the_catalog_and_every_entry_is_emitted():
    assert set(emitted()) == set(catalog.CATALOG)


def test_every_code_stands_once_and_in_order():
    codes = [entry.code for entry in catalog.ENTRIES]
    assert codes == sorted(set(codes))


@pytest.mark.parametrize("entry", catalog.ENTRIES, ids=lambda entry: entry.code)
def test_an_entry_says_enough_and_not_too_much(entry):
    lines = entry.explanation.splitlines()
    assert 2 <= len(lines) <= 10
    assert max(map(len, lines)) <= 120
    assert entry.title
    assert not entry.title[0].isupper() or entry.title.startswith("Python")
    assert not entry.title.endswith(".")
    assert bool(entry.wrong) == bool(entry.right)


def test_the_page_of_errors_is_the_catalogs():
    """`python -m tests.errors.update` writes it."""
    assert (ROOT / "docs" / "errors.md").read_text() == catalog.as_markdown()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    return result.exit_code, result.output


@pytest.mark.parametrize("written", ["SS301", "ss301", "301", "error[SS301]"])
def test_explain_prints_an_entry(written):
    status, text = run("explain", written)
    assert status == 0
    assert text.startswith("SS301: a size that cannot be split evenly")


def test_explain_of_an_unknown_code_suggests_others_and_fails():
    status, text = run("explain", "SS3011")
    assert status == 2
    assert "did you mean SS31" in text or "did you mean SS30" in text


def test_explain_without_a_code_lists_all():
    status, text = run("explain")
    assert status == 0
    assert [line[:5] for line in text.splitlines()] == list(catalog.CATALOG)


def test_explain_answers_without_importing_torch():
    script = (
        "import sys; from click.testing import CliRunner; from shardspec.cli import main\n"
        "result = CliRunner().invoke(main, ['explain', 'SS301'])\n"
        "print(result.exit_code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["0", "False", "False"]


def test_the_command_is_an_entry_point():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["shardspec"] == "shardspec.cli:main"


def test_every_public_name_is_there_and_comes_from_the_module_that_the_types_name():
    text = (ROOT / "shardspec" / "__init__.py").read_text()
    typed = dict[str, str]()
    for module, names in re.findall(r"^    from (\S+) import (.+)$", text, re.MULTILINE):
        typed |= dict.fromkeys((name.strip() for name in names.split(",")), module)
    assert typed == shardspec._HOME
    assert set(typed) == set(shardspec.__all__) == set(dir(shardspec))
    for name in shardspec.__all__:
        assert getattr(shardspec, name) is getattr(sys.modules[typed[name]], name)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        shardspec.compil  # noqa: B018
