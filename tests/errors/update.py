"""Write every golden file and docs/errors.md anew: `python -m tests.errors.update`."""

import importlib.util
import os
from pathlib import Path

import shardspec as ss
from shardspec import catalog

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MISTAKES = sorted(path.stem for path in HERE.glob("ss[0-9]*.py"))
"""The mistakes, by file name."""


def rendered(name: str) -> str:
    """What a user is told of a mistake, with paths as seen from the root of the repository."""
    spec = importlib.util.spec_from_file_location(f"tests.errors.{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    was = Path.cwd()
    os.chdir(ROOT)
    try:
        module.trigger()
    except ss.ShardingError as error:
        return str(error).strip() + "\n"
    finally:
        os.chdir(was)
    raise AssertionError(f"{name} is not refused")


def main() -> None:
    for name in MISTAKES:
        (HERE / f"{name}.err").write_text(rendered(name))
    (ROOT / "docs" / "errors.md").write_text(catalog.as_markdown())


if __name__ == "__main__":
    main()
