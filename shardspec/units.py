"""Units: the modules that are gathered, rematerialised and compiled together."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

from shardspec.diagnostics import Diagnostic
from shardspec.names import fold
from shardspec.plan import UnitPlan
from shardspec.rules.match import as_pattern
from shardspec.rules.table import Rules
from shardspec.spec import SpecError, parse
from shardspec.survey import View
from shardspec.twin import MODULE_STATE


def resolve_units(rules: Rules, names: View) -> tuple[tuple[UnitPlan, ...], list[Diagnostic]]:
    """The units of a table over a model's modules, the root unit last; units that share a tied parameter merge.

    Returns:
        The units, and SS211 for a pattern that matches no module, SS204 for a module that two claim.
    """
    found: list[Diagnostic] = []
    groups: list[list[str]] = []
    owner: dict[str, object] = {}
    for unit in rules.units:
        patterns = (unit,) if isinstance(unit, str) else unit
        matched: list[str] = []
        for pattern in patterns:
            hits = [name for name in names.modules if re.fullmatch(pattern, name)]
            if not hits:
                found.append(_unknown(rules, pattern, "units", names.modules))
            matched += hits
        for name in matched:
            if name in owner:
                found.append(_twice(rules, name, str(owner[name]), str(unit)))
            owner[name] = unit
        groups += [[name] for name in matched] if isinstance(unit, str) else [matched] if matched else []
    first_names = {name: known.first for name, known in names.parameters.items() if not known.is_buffer}
    return (() if found else tuple(_fill(groups, first_names))), found


def _unknown(rules: Rules, pattern: str, where: str, modules: Iterable[str]) -> Diagnostic:
    known = list(dict.fromkeys(map(fold, modules)))
    near = difflib.get_close_matches(pattern, list(map(as_pattern, known)), n=1)
    listed = "" if near else "\nthe modules are " + ", ".join(known[:MOST_MODULES])
    listed += ", ..." if listed and len(known) > MOST_MODULES else ""
    return Diagnostic(
        code="SS211",
        what=f'{where}: r"{pattern}" matches no module',
        why=f"a pattern there is matched whole against the FQN of a module{listed}",
        locations=(rules.line_of(pattern),),
        advice=(f'did you mean r"{near[0]}"?',) if near else (),
    )


MOST_MODULES = 12
"""How many modules a message lists."""


def _no_size(rules: Rules, pattern: str, name: str, module: object, attribute: str) -> Diagnostic:
    """SS211 for an attribute that a module does not have, or that is no whole number."""
    sizes = {key: value for key, value in vars(module).items() if type(value) is int and key not in MODULE_STATE}
    has = hasattr(module, attribute)
    near = difflib.get_close_matches(attribute, list(sizes), n=1)
    held = ", ".join(f"{key}={value}" for key, value in sizes.items()) or "none"
    return Diagnostic(
        code="SS211",
        what=f"{name} has no attribute {attribute} that holds a size",
        why=(f"{attribute} is {getattr(module, attribute)!r}\n" if has else "") + f"its whole numbers are: {held}",
        locations=(rules.line_of(pattern),),
        advice=(f"did you mean {near[0]}?",) if near else (),
    )


def check_experts(rules: Rules, modules: Iterable[str]) -> Iterator[Diagnostic]:
    """SS103 and SS211 for `experts=` that is no regex, or names no module."""
    pattern = rules.experts or ""
    good = isinstance(rules.capacity, (int, float)) and rules.capacity > 0
    if rules.capacity is not None and not (good and rules.experts):
        yield Diagnostic(
            code="SS211",
            what=f"capacity={rules.capacity!r}" + ("" if rules.experts else " and no experts="),
            why="it says how many assignments an expert takes, in units of as many as each gets where all get the "
            "same: a number above 0, for the modules that experts= names",
            locations=(rules.location,),
            advice=("give 1.25, say, or leave it out: then an expert takes all",),
        )
    if not rules.experts:
        return
    try:
        regex = re.compile(pattern)
    except re.error as error:
        place = rules.line_of(pattern)
        yield Diagnostic(code="SS103", what=f'experts: r"{pattern}" is no regex: {error}', locations=(place,))
        return
    if not any(map(regex.fullmatch, modules)):
        yield _unknown(rules, pattern, "experts", modules)


def _twice(rules: Rules, name: str, one: str, two: str) -> Diagnostic:
    return Diagnostic(
        code="SS204",
        what=f"two units claim the module {name}",
        why=f"{one} and {two}; a module is gathered with one unit",
        locations=(rules.line_of(two),),
    )


def _fill(groups: list[list[str]], first_names: Mapping[str, str]) -> Iterator[UnitPlan]:
    """Give each parameter to the innermost unit that holds it, and merge units over ties."""
    held: dict[str, int] = {}
    home = {module: index for index, group in enumerate(groups) for module in group}
    merged = list(range(len(groups) + 1))
    root = len(groups)

    def find(index: int) -> int:
        while merged[index] != index:
            index = merged[index]
        return index

    for name, first in first_names.items():
        path = name
        while path and path not in home:
            path = path.rpartition(".")[0]
        unit = find(home[path]) if path else root
        if first in held and find(held[first]) != unit:
            one, two = sorted((find(held[first]), unit))
            # The root holds whatever is in no unit: what merges with it belongs to it.
            merged[one if two == root else two] = two if two == root else one
        held.setdefault(first, unit)
    params: dict[int, list[str]] = {}
    for name, unit in held.items():
        params.setdefault(find(unit), []).append(name)
    modules: dict[int, list[str]] = {}
    for index, group in enumerate(groups):
        modules.setdefault(find(index), []).extend(group)
    for index in [*range(len(groups)), root]:
        if find(index) == index:
            own = tuple(modules.get(index, ())) if index != root else ()
            yield UnitPlan(name="+".join(own), modules=own, params=tuple(params.get(index, ())))


def resolve_attributes(
    rules: Rules, modules: Mapping[str, object], degrees: Mapping[str, int]
) -> tuple[dict[str, dict[str, int]], list[Diagnostic]]:
    """Module -> attribute -> local value, for `attributes=`; SS211 for an unknown place, SS301 for an uneven one."""
    local: dict[str, dict[str, int]] = {}
    found: list[Diagnostic] = []
    for pattern, named in rules.attributes.items():
        hits = [name for name in modules if re.fullmatch(pattern, name)]
        if not hits:
            found.append(_unknown(rules, pattern, "attributes", modules))
        for attribute, text in named.items():
            try:
                axes = parse(text).axes
            except SpecError as error:
                found.append(
                    Diagnostic(
                        code="SS103",
                        what=f"spec cannot be read: {error}",
                        locations=(rules.line_of(pattern),),
                    )
                )
                continue
            share = 1
            for axis in axes:
                share *= degrees.get(axis, 1)
            for name in hits:
                value = getattr(modules[name], attribute, None)
                if not isinstance(value, int) or isinstance(value, bool):
                    found.append(_no_size(rules, pattern, name, modules[name], attribute))
                    break
                if value % share:
                    found.append(
                        Diagnostic(
                            code="SS301",
                            what=f"{attribute}={value} cannot be split over {' x '.join(axes)}={share}",
                            why=f"{share} does not divide {value} ({name})",
                            locations=(rules.line_of(pattern),),
                            advice=(f"{axes[0]} in {{{_divisors(value)}}}",) if len(axes) == 1 else (),
                        )
                    )
                    break
                local.setdefault(name, {})[attribute] = value // share
    return local, found


def attribute_sizes(rules: Rules, modules: Mapping[str, object]) -> dict[str, int]:
    """Factor -> its size by `attributes=`, where one is named alone and every module has the same number."""
    found: dict[str, set[object]] = {}
    for pattern, named in rules.attributes.items():
        hits = [module for name, module in modules.items() if re.fullmatch(pattern, name)]
        for attribute, text in named.items():
            factor = re.match(r"[A-Za-z_]\w*(?=@|$)", text)
            if factor:
                found.setdefault(factor.group(), set()).update(getattr(module, attribute, None) for module in hits)
    alone = {name: next(iter(values)) for name, values in found.items() if len(values) == 1}
    return {name: value for name, value in alone.items() if type(value) is int}


def _divisors(value: int) -> str:
    return ", ".join(str(n) for n in range(1, value + 1) if value % n == 0)
