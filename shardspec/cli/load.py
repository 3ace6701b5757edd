"""From `module:name` to what it names, in words that a user can act on where there is nothing of the name."""

import difflib
import importlib
import linecache
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

import click

from shardspec.diagnostics import ShardingError, shorten

_HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_STANDARD = sysconfig.get_path("stdlib")


def load(reference: str, what: str) -> Any:
    """What `module:name` names; a name may have dots.

    Args:
        what: the option that is told of in a message, as `--inputs`.

    Raises:
        click.UsageError: for a reference, a module or a name that is none, and for a module that cannot be imported.
        ShardingError: that a table raises where it is made.
    """
    module, name = _split(reference, what)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            _no_name(f"{what} {reference}: {module.__name__} has no {name}", name, _public(value))
        value = getattr(value, part)
    return value


def load_model(reference: str) -> tuple[ModuleType, Any]:
    """The module of `module:name`, and the model or the builder that it names: a preset first, then an attribute.

    A module with presets has `PRESETS`, a mapping, and `build(preset)`; one with `build` alone is given any name.

    Raises:
        click.UsageError: as `load`, and for what is no model.
    """
    module, name = _split(reference, "--model")
    presets, build = getattr(module, "PRESETS", None), getattr(module, "build", None)
    named = presets if isinstance(presets, Mapping) else {}
    if callable(build) and (name in named or (presets is None and not hasattr(module, name))):
        return module, partial(build, name)
    if not hasattr(module, name):
        _no_name(f"--model {reference}: {module.__name__} has no preset {name!r}", name, map(str, named), every=True)
    value = getattr(module, name)
    if not callable(value):
        raise click.UsageError(
            f"--model {reference}: {name} is a {type(value).__name__}; a model is a preset, a module, or a function "
            "that builds one"
        )
    return module, value


def blame(error: BaseException) -> str:
    """An error of a user's own code in a line or two: what it says, and the innermost line of theirs."""
    if isinstance(error, SyntaxError) and error.filename:
        file, line, text = error.filename, error.lineno or 0, error.text or ""
        message = error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame for frame in frames if _is_theirs(frame.filename)]
        file, line = (theirs[-1].filename, theirs[-1].lineno or 0) if theirs else ("", 0)
        text, message = linecache.getline(file, line), str(error).strip().split("\n")[0]
    place = f"\n  --> {shorten(file)}:{line}   {text.strip()}" if file else ""
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


def _is_theirs(file: str) -> bool:
    if "site-packages" in file:
        return f"site-packages{os.sep}torch{os.sep}" not in file
    return not file.startswith((_HERE, _STANDARD, "<"))


def _split(reference: str, what: str) -> tuple[ModuleType, str]:
    path, colon, name = reference.partition(":")
    if not colon or not path or not name:
        raise click.UsageError(f"{what} {reference!r} is not module:name, as in models.llama:RULES")
    if path.endswith(".py") or "/" in path:
        dotted = path.removesuffix(".py").strip("./").replace("/", ".")
        raise click.UsageError(f"{what} {reference}: give a module, not a file: {dotted}:{name}")
    return _module(path, f"{what} {reference}"), name


def _module(path: str, told: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ShardingError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (path == missing or path.startswith(f"{missing}.")):
            raise click.UsageError(f"{told}: {path} cannot be imported: {blame(error)}") from None
        parent, _, last = missing.rpartition(".")
        places = getattr(sys.modules.get(parent), "__path__", None) if parent else None
        known = [module.name for module in pkgutil.iter_modules(places)] if places or not parent else []
        near = difflib.get_close_matches(last, known, n=1)
        meant = f"; did you mean {'.'.join(filter(None, (parent, near[0])))}?" if near else ""
        raise click.UsageError(f"{told}: there is no module {missing}{meant}") from None
    except (Exception, SystemExit) as error:
        # A module runs whatever its author wrote: all of it is theirs to mend, none of it a fault of this program.
        raise click.UsageError(f"{told}: {path} cannot be imported: {blame(error)}") from None


def _public(value: Any) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]


def _no_name(message: str, name: str, known: Iterable[str], *, every: bool = False) -> NoReturn:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    listed = f"; there are {', '.join(known)}" if every and known and not near else ""
    raise click.UsageError(message + (meant or listed))
