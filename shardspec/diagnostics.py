"""What a user is told: one frozen `Diagnostic` a mistake, rendered here and nowhere else."""

import linecache
import os
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, NoReturn

from attrs import field, frozen


@frozen(kw_only=True)
class Location:
    """A place in a user's source: a rule of the table, or a line of the model."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}   {self.text}" if self.text else place


def shorten(file: str) -> str:
    """The path as seen from the working directory, where it lies below it."""
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    return file if relative.startswith("..") else relative


def calling_frame() -> FrameType:
    """The nearest frame outside this package."""
    frame = sys._getframe(1)
    ours = (os.path.dirname(os.path.abspath(__file__)) + os.sep, "<attrs generated")
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return frame


def calling_line() -> Location:
    """The line of the nearest frame outside this package."""
    frame = calling_frame()
    file, line = frame.f_code.co_filename, frame.f_lineno
    return Location(file=shorten(file), line=line, text=linecache.getline(file, line).strip())


@frozen(kw_only=True)
class Diagnostic:
    """One mistake: `what` in a line, `why` with the arithmetic, `fixes` that passed when they were tried.

    `advice` holds what could not be tried here, such as an edit of the model itself.
    """

    code: str
    what: str
    why: str = ""
    fixes: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    locations: tuple[Location, ...] = ()
    matches: str = ""
    hints: tuple[Any, ...] = field(default=(), eq=False, repr=False)
    """Edits that are still to be tried; those that pass become `fixes`."""

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        lines += [f"  --> {location}" for location in self.locations]
        if self.matches:
            lines.append(f"   = matches {self.matches}")
        lines += [f"   = why: {line}" for line in self.why.splitlines()]
        lines += [f"   = fix: {fix}   (checked)" for fix in self.fixes]
        lines += [f"   = help: {line}" for line in self.advice]
        return "\n".join(lines)


class ShardingError(Exception):
    """Everything wrong that one stage found; `diagnostics` holds each, `str()` renders them all."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        count = len(self.diagnostics)
        tail = f"\n\n{count} errors" if count > 1 else ""
        return "\n" + "\n\n".join(str(diagnostic) for diagnostic in self.diagnostics) + tail

    def __reduce__(self) -> tuple[type, tuple[tuple[Diagnostic, ...]]]:
        return type(self), (self.diagnostics,)


class DonatedError(RuntimeError):
    """A state, or a tensor of a state, was used after a step had consumed it."""


def refuse(code: str, what: str, **details: object) -> NoReturn:
    """Raise a `ShardingError` that holds one diagnostic."""
    raise ShardingError([Diagnostic(code=code, what=what, **details)])  # pyright: ignore[reportArgumentType]
