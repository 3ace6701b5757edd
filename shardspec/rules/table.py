"""The table a user writes: regex -> spec, and where in the source each entry stands."""

import ast
import difflib
import functools
import linecache
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from attrs import field, frozen

from shardspec.diagnostics import Diagnostic, Location, ShardingError, calling_frame, calling_line, refuse, shorten
from shardspec.spec import P

Unit = str | tuple[str, ...]


@frozen
class Origin:
    """The call that made an entry: a file, and a line inside the call."""

    file: str
    line: int


@frozen(eq=False)
class Rule:
    """One entry of a table."""

    kind: str
    """"params" or "activations"."""
    pattern: str
    value: str | P
    origin: Origin

    @property
    def location(self) -> Location:
        """File and line of the entry, found in the source when it is first asked for."""
        line = _line_of(self.origin.file, self.origin.line, self.pattern)
        value = f'"{self.value}"' if isinstance(self.value, str) else repr(self.value)
        return Location(file=shorten(self.origin.file), line=line, text=f'r"{self.pattern}": {value}')


def caller() -> Origin:
    """The nearest frame outside this package."""
    frame = calling_frame()
    return Origin(frame.f_code.co_filename, frame.f_lineno)


@functools.lru_cache(maxsize=64)
def _string_lines(file: str) -> tuple[tuple[str, int], ...]:
    source = "".join(linecache.getlines(file))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return tuple((node.value, node.lineno) for node in nodes if isinstance(node.value, str))


def _line_of(file: str, near: int, pattern: str, default: int | None = None) -> int:
    """The line of the string `pattern` in `file` that is nearest to the call; the call's own where none is."""
    lines = [line for text, line in _string_lines(file) if text == pattern]
    return min(lines, key=lambda line: abs(line - near), default=near if default is None else default)


@frozen(init=False, eq=False)
class Rules:
    """The table for one model family: what is laid over which axis.

    Args:
        params: pattern -> spec; a pattern is matched whole against the FQN of a parameter or buffer.
        activations: pattern -> spec, matched whole against an activation's name.
        units: a pattern makes a unit of each module that it matches, a tuple of patterns one of all.
        pipeline: a pattern whose group `pp` is the index that is laid over `pp`.
        experts: the modules that follow the experts protocol.
        attributes: module pattern -> {attribute: spec of one dim}, for global sizes kept in a module.
        sizes: factor -> size, where nothing else tells it.
        capacity: how many assignments of a microbatch an expert takes at most, in units of as many as each gets where
            all get the same; the first ones, by token and choice. All of them where it is None.
    """

    params: tuple[Rule, ...]
    activations: tuple[Rule, ...]
    units: tuple[Unit, ...]
    pipeline: str | None
    experts: str | None
    attributes: dict[str, dict[str, str]] = field()
    sizes: dict[str, int]
    capacity: float | None
    origin: Origin
    origins: tuple[Origin, ...] = ()
    """Where the table was made, and each `override` after it."""

    def __init__(
        self,
        params: Mapping[str, str | P],
        activations: Mapping[str, str | P] | None = None,
        units: Sequence[Unit] = (),
        pipeline: str | None = None,
        experts: str | None = None,
        attributes: Mapping[str, Mapping[str, str]] | None = None,
        sizes: Mapping[str, int] | None = None,
        capacity: float | None = None,
    ) -> None:
        check_kinds(
            params=params,
            activations=activations,
            units=units,
            pipeline=pipeline,
            experts=experts,
            attributes=attributes,
            sizes=sizes,
        )
        origin = caller()
        self.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            params=_entries("params", params, origin),
            activations=_entries("activations", activations or {}, origin),
            units=_units(units),
            pipeline=pipeline,
            experts=experts,
            attributes={pattern: dict(named) for pattern, named in (attributes or {}).items()},
            sizes=dict(sizes or {}),
            capacity=capacity,
            origin=origin,
            origins=(origin,),
        )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Parameters' entries, then activations'."""
        return self.params + self.activations

    def line_of(self, text: str) -> Location:
        """Where a string of the table stands in the source: in the last call that has it."""
        for origin in (*reversed(self.origins), self.origin):
            line = _line_of(origin.file, origin.line, text, 0)
            if line:
                return Location(file=shorten(origin.file), line=line, text=f'r"{text}"')
        return self.location

    @property
    def location(self) -> Location:
        """Where the table is made."""
        return Location(file=shorten(self.origin.file), line=self.origin.line)

    def override(
        self,
        params: Mapping[str, str | P] | None = None,
        activations: Mapping[str, str | P] | None = None,
        drop: Sequence[str] = (),
        units: Sequence[Unit] | None = None,
        sizes: Mapping[str, int | None] | None = None,
        pipeline: str | None = None,
        experts: str | None = None,
        attributes: Mapping[str, Mapping[str, str]] | None = None,
        capacity: float | None = None,
    ) -> "Rules":
        """A new table: an entry with the same pattern is replaced, others are added, `drop` removes patterns.

        `units` replaces those of the table; a size of None in `sizes` forgets the table's.

        Raises:
            ShardingError: SS201 for a pattern in `drop` that the table does not have.
        """
        check_kinds(
            params=params or {},
            activations=activations,
            units=units,
            pipeline=pipeline,
            experts=experts,
            attributes=attributes,
            sizes=sizes,
        )
        origin = caller()
        drop = (drop,) if isinstance(drop, str) else tuple(drop)
        missing = [pattern for pattern in drop if all(rule.pattern != pattern for rule in self.rules)]
        if missing:
            raise ShardingError(_absent(pattern, self, origin) for pattern in missing)
        new: Rules = object.__new__(Rules)
        new.__attrs_init__(  # pyright: ignore[reportAttributeAccessIssue]
            params=_merge(self.params, _entries("params", params or {}, origin), drop),
            activations=_merge(self.activations, _entries("activations", activations or {}, origin), drop),
            units=self.units if units is None else _units(units),
            pipeline=self.pipeline if pipeline is None else pipeline,
            experts=self.experts if experts is None else experts,
            capacity=self.capacity if capacity is None else capacity,
            attributes={
                **self.attributes,
                **{pattern: dict(named) for pattern, named in (attributes or {}).items()},
            },
            sizes={name: size for name, size in {**self.sizes, **(sizes or {})}.items() if size is not None},
            origin=self.origin,
            origins=(*self.origins, origin),
        )
        return new


def check_kinds(*, params: Any, units: Any, **rest: Any) -> None:
    """SS103 for an argument of a table that is of another kind: what would fail later, far from the table."""
    mappings = {"params": params} | {name: rest[name] for name in ("activations", "attributes", "sizes")}
    for name, value in mappings.items():
        if value is None and name != "params":
            continue
        if not isinstance(value, Mapping):
            _wrong_kind(
                name, value, "a dict, with patterns as its keys" if name != "sizes" else "a dict: factor -> size"
            )
        for key, said in value.items():
            if not isinstance(key, str):
                _wrong_kind(f"{name}: a key", key, "a string")
            if name == "attributes" and not isinstance(said, Mapping):
                _wrong_kind(
                    f'attributes: r"{key}"', said, 'a dict: attribute -> spec of one dim, as {"n_heads": "H@tp"}'
                )
    for name in ("pipeline", "experts"):
        if not isinstance(rest[name], str | None):
            _wrong_kind(name, rest[name], "one pattern: a string")
    listed = () if units is None or isinstance(units, str) else units
    if not isinstance(listed, Sequence) or not all(_is_unit(unit) for unit in listed):
        _wrong_kind("units", units, "a list of patterns, and of tuples of patterns")


def _is_unit(unit: Any) -> bool:
    return isinstance(unit, str) or (isinstance(unit, tuple | list) and all(isinstance(part, str) for part in unit))


def _wrong_kind(name: str, value: Any, wanted: str) -> NoReturn:
    refuse("SS103", f"{name} is {value!r}", why=f"it is {wanted}", locations=(calling_line(),))


def _absent(pattern: str, rules: Rules, origin: Origin) -> Diagnostic:
    near = difflib.get_close_matches(pattern, [rule.pattern for rule in rules.rules], n=1)
    return Diagnostic(
        code="SS201",
        what=f'override drops r"{pattern}", which the table does not have',
        why="`drop` names the pattern of an entry, letter for letter",
        locations=(Location(file=shorten(origin.file), line=_line_of(origin.file, origin.line, pattern)),),
        advice=(f'did you mean r"{near[0]}"?',) if near else (),
    )


def _units(units: Unit | Sequence[Unit]) -> tuple[Unit, ...]:
    """One pattern, or several, as the units of a table."""
    listed = (units,) if isinstance(units, str) else units
    return tuple(unit if isinstance(unit, str) else tuple(unit) for unit in listed)


def _entries(kind: str, table: Mapping[str, str | P], origin: Origin) -> tuple[Rule, ...]:
    return tuple(Rule(kind, pattern, value, origin) for pattern, value in table.items())


def _merge(old: tuple[Rule, ...], new: tuple[Rule, ...], drop: tuple[str, ...]) -> tuple[Rule, ...]:
    replaced = {rule.pattern: rule for rule in new}
    kept = [replaced.pop(rule.pattern, rule) for rule in old if rule.pattern not in drop or rule.pattern in replaced]
    return (*kept, *replaced.values())
