"""Units: the modules that are gathered, rematerialised and compiled together."""

import re
from collections.abc import Iterator, Mapping

from shardspec.diagnostics import Diagnostic
from shardspec.plan import UnitPlan
from shardspec.rules.table import Rules
from shardspec.spec import SpecError, parse
from shardspec.survey import View


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
                found.append(_unknown(rules, pattern, "units"))
            matched += hits
        for name in matched:
            if name in owner:
                found.append(_twice(rules, name, str(owner[name]), str(unit)))
            owner[name] = unit
        groups += [[name] for name in matched] if isinstance(unit, str) else [matched] if matched else []
    first_names = {name: known.first for name, known in names.parameters.items() if not known.is_buffer}
    return (() if found else tuple(_fill(groups, first_names))), found


def _unknown(rules: Rules, pattern: str, where: str) -> Diagnostic:
    return Diagnostic(
        code="SS211",
        what=f'{where}: r"{pattern}" matches no module',
        why="a pattern there is matched whole against the FQN of a module",
        locations=(rules.line_of(pattern),),
    )


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
            found.append(_unknown(rules, pattern, "attributes"))
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
                    found.append(
                        Diagnostic(
                            code="SS211",
                            what=f"{name} has no attribute {attribute} that holds a size",
                            why=f"attributes= names whole numbers; {attribute} is {value!r}",
                            locations=(rules.line_of(pattern),),
                        )
                    )
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
