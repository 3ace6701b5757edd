"""`assert_total`: a table against the names of a model, without a mesh or a batch."""

import re
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from shardspec.arguments import as_model, check_arguments
from shardspec.claims import match_params
from shardspec.diagnostics import Diagnostic, ShardingError
from shardspec.mesh import Mesh
from shardspec.rules.match import assign
from shardspec.rules.parse import Entry, Table, parse_table
from shardspec.rules.table import Rules
from shardspec.survey import Model, Survey, survey
from shardspec.twin import argument_names
from shardspec.units import resolve_attributes, resolve_units

OUTPUTS = 16
"""How many outputs of a module, named by their index, a pattern is tried on."""


class NotTotalError(ShardingError, AssertionError):
    """A table and a model's names do not cover each other; `diagnostics` holds each mistake, as `compile` has it."""


def assert_total(rules: Rules, model: Model, names: Sequence[str] = ()) -> None:
    """Check that a table and a model's names cover each other; no mesh, no batch, no forward.

    Every parameter and buffer is claimed by exactly one rule and fits its spec's rank, a module's input or output by
    at most one; every rule, unit and attribute claims something. What only a run tells is taken in the rule's favour:
    a plain word (`labels`) may be a batch entry that the loss reads alone, and what `ss.name` or a further output is
    called is looked for among the words of the model's source. `compile` checks those too.

    Args:
        model: a module, on meta or real, or a function that builds one; it is only read.
        names: activations and batch entries that are known to exist beside those of the model.

    Raises:
        NotTotalError: a ShardingError and an AssertionError, with everything that was found.
    """
    check_arguments(rules, Mesh(), None)
    known = survey(as_model(model))
    table, found = parse_table(rules)
    if not found:
        _, _, found = match_params(table, known.whole, Mesh())
        found += _activations(table, known, names)
        found += resolve_units(rules, known.whole)[1]
        found += resolve_attributes(rules, known.whole.modules, {})[1]
    if found:
        raise NotTotalError(found)


def _activations(table: Table, known: Survey, names: Sequence[str]) -> list[Diagnostic]:
    """SS203 and SS204 for the rules of activations."""
    modules = {fqn: module for fqn, module in known.model.named_modules() if fqn and has_forward(module)}
    sure = [*known.arguments, *names]
    sure += [name for fqn in modules for name in (fqn, f"{fqn}:in") if name not in sure]

    def alive(entry: Entry) -> bool:
        if re.fullmatch(r"\w+(\|\w+)*", entry.rule.pattern):
            return True
        return any(entry.regex.fullmatch(name) for name in possible({"": known.model, **modules}))

    return assign(table.activations, sure, needed=lambda _: False, what=lambda _: "activation", alive=alive)[1]


def has_forward(module: nn.Module) -> bool:
    """Whether a module can be called: a list of modules cannot."""
    return type(module).forward is not nn.Module.forward


def possible(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Names that activations may have beside the modules' own: further inputs and outputs, and what `ss.name` says."""
    words: dict[type, frozenset[str]] = {}
    for fqn, module in modules.items():
        kind = type(module)
        if kind not in words:
            words[kind] = frozenset(source_words(kind))
        if fqn:
            yield from (f"{fqn}:in.{name}" for name in argument_names(kind.forward)[1:])
            yield from (f"{fqn}:out.{index}" for index in range(OUTPUTS))
            yield from (f"{fqn}:out.{word}" for word in words[kind])
        yield from (f"{fqn}.{word}" if fqn else word for word in words[kind])


def source_words(kind: type) -> Iterator[str]:
    """The words that stand in a class's source and in its file as strings or keywords."""
    for each in kind.__mro__:
        if each.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        file = sys.modules.get(each.__module__)
        for item in (each, *(vars(file).values() if file is not None else ())):
            if getattr(item, "__module__", None) == each.__module__:
                yield from _words_of(item)


def _words_of(item: Any) -> Iterator[str]:
    if isinstance(item, type):
        for member in vars(item).values():
            if not isinstance(member, type):
                yield from _words_of(member)
    code = getattr(getattr(item, "__func__", item), "__code__", None)
    if isinstance(code, types.CodeType):
        yield from _constants(code.co_consts)


def _constants(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant
        elif isinstance(constant, tuple):
            yield from _constants(constant)
        elif isinstance(constant, types.CodeType):
            yield from _constants(constant.co_consts)
