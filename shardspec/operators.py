"""`ss.register_rule`: an operator's rule of the user's own, brute-forced on samples before it is accepted."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from attrs import evolve, frozen
from torch import Tensor

from shardspec.diagnostics import Diagnostic, Location, ShardingError, calling_line
from shardspec.layout import AVG, MAX, MIN, SUM
from shardspec.nests import replace_tensors, tensor_leaves
from shardspec.rules.factors import FactorRule, Notation, NotationError, parse_notation, size_names
from shardspec.rules.operator import RULES
from shardspec.rules.pointwise import is_pointwise
from shardspec.testing.trials import Failure, Misfit, Sample, try_rule
from shardspec.torch_private import OpOverload, OpOverloadPacket, overload_of

Notations = str | Callable[..., str]


def register_rule(
    op: Any,
    notation: Notations | None = None,
    *,
    samples: Sequence[Any] = (),
    linear: bool | str | Sequence[str | tuple[str, ...]] = (),
    reduction: str = SUM,
    sizes: Mapping[str, str] | None = None,
    any_value: str | Sequence[str] = (),
    gradients: bool = True,
) -> Any:
    """Give an operator a rule in factor notation, `"b s d, d -> b s d"`, if brute force finds nothing wrong with it.

    Every layout that the rule accepts on the samples, over one axis and over each pair, is tried: the operator runs
    on every rank's part, and results and gradients are compared with those of the whole. A rule of one's own may be
    given again, and is then replaced.

    Args:
        op: an overload, a packet that has one, or what `torch.library.custom_op` gives.
        notation: a factor for each dim of each tensor that is read, `->`, and of each that is made. A factor without
            a part in any result is reduced. `!d` must not be split, `(h e)` is a dim of two factors, `...` are any
            dims. Or a function of the operator's arguments, by name, that gives such a text; where it is left out,
            `register_rule` decorates that function.
        samples: calls to try: tuples of arguments in order, or dicts by name. Small tensors of random values on the
            CPU, best of float64; each factor that may be split is a multiple of four in one of them.
        linear: the tensor arguments in each of which the operator is linear, the others fixed; as a tuple in it those
            in which it is linear together. True: each. A value that is still to be summed may be passed for those.
        reduction: what reduces the factors that no result has: "sum", "avg", "max" or "min".
        sizes: argument -> the factor that it is the size of, `{"n_heads": "h"}`: a rank passes its part's.
        any_value: arguments that do not matter to the layout. For the others a call must have values of a sample.
        gradients: False for an operator without a backward.

    Returns:
        `op` as it was given, or the decorated function.

    Raises:
        ShardingError: SS321 for a rule that brute force refutes, SS322 for one that cannot be tried.
    """
    place = calling_line()

    def register(given: Notations) -> Any:
        overload = _overload(op, place)
        names = _names(any_value)
        request = Request(overload, place, gradients)
        candidate = request.candidate(given, linear, reduction, dict(sizes or {}), frozenset(names))
        RULES[overload] = request.accepted(candidate, request.samples(samples))
        return op if notation is not None else given

    return register if notation is None else register(notation)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _overload(op: Any, place: Location) -> Any:
    """The overload that a user means."""
    found = overload_of(op) or op
    if isinstance(found, OpOverloadPacket):
        overloads = found.overloads()
        if len(overloads) > 1:
            _refuse(place, f"{found} has several overloads", f"they are {', '.join(overloads)}: name one of them")
        found = getattr(found, overloads[0])
    if not isinstance(found, OpOverload):
        _refuse(
            place,
            f"{op!r} is no operator",
            "a rule is for an operator of torch.ops; torch.library.custom_op makes one of a function",
        )
    known = RULES.get(found)
    own = found.namespace not in ("aten", "prims")
    if (known is not None and not isinstance(known, FactorRule)) or (known is None and is_pointwise(found) and not own):
        _refuse(place, f"{found} has a rule already", "a rule that the package brings is not replaced")
    if found._schema.is_mutable:
        _refuse(place, f"{found} writes to its arguments", "make an operator of it that gives new tensors")
    if torch.Tag.nondeterministic_seeded in found.tags:
        _refuse(place, f"{found} draws random numbers", "ranks would draw apart; hand the noise in as an argument")
    return found


def _refuse(place: Location, what: str, why: str, *advice: str) -> NoReturn:
    raise ShardingError([Diagnostic(code="SS322", what=what, why=why, locations=(place,), advice=advice)])


@frozen
class Request:
    """A user's wish for an operator's rule."""

    op: Any
    place: Location
    gradients: bool

    def refuse(self, why: str, *advice: str) -> NoReturn:
        """Raise SS322."""
        _refuse(self.place, f"the rule of {self.op} cannot be tried", why, *advice)

    def candidate(
        self,
        notation: Notations,
        linear: bool | str | Sequence[str | tuple[str, ...]],
        reduction: str,
        sizes: dict[str, str],
        any_value: frozenset[str],
    ) -> FactorRule:
        """The rule as it is asked for, if it can be read."""
        arguments = {argument.name: argument for argument in self.op._schema.arguments}
        of_tensors = [name for name, argument in arguments.items() if "Tensor" in str(argument.type)]
        if isinstance(linear, bool):
            linear = of_tensors if linear else ()
        groups = tuple(frozenset(_names(group)) for group in _names_or_groups(linear))
        for name in (*sizes, *any_value, *(name for group in groups for name in group)):
            if name not in arguments:
                self.refuse(f"it has no argument {name!r}; its schema is {self.op._schema}")
        for name in (name for group in groups for name in group):
            if name not in of_tensors:
                self.refuse(f"linear= names {name!r}, which is no tensor")
        if reduction not in (SUM, AVG, MAX, MIN):
            self.refuse(f'reduction={reduction!r} is none of "sum", "avg", "max", "min"')
        try:
            for text in sizes.values():
                size_names(text)
            if isinstance(notation, str):
                parse_notation(notation)
        except NotationError as error:
            self.refuse(f"{error}\nin {notation!r}")
        return FactorRule(notation=notation, linear=groups, reduction=reduction, sizes=sizes, any_value=any_value)

    def samples(self, given: Sequence[Any]) -> tuple[Sample, ...]:
        """The sample calls, with arguments by name."""
        if isinstance(given, Tensor) or not given:
            self.refuse("it needs samples: calls to try it on", "samples=[(x, w)], with small random tensors")
        schema = self.op._schema.arguments
        found: list[Sample] = []
        for number, sample in enumerate(given):
            if isinstance(sample, Mapping):
                named = dict(sample)
            else:
                items = (sample,) if isinstance(sample, Tensor) else tuple(sample)
                if len(items) > len(schema):
                    self.refuse(f"sample {number} has {len(items)} arguments; the schema is {self.op._schema}")
                named = {argument.name: item for argument, item in zip(schema, items, strict=False)}
            surplus = set(named) - {argument.name for argument in schema}
            if surplus:
                self.refuse(f"sample {number} has {', '.join(sorted(surplus))}; the schema is {self.op._schema}")
            if any(leaf.is_meta for leaf in tensor_leaves(named)):
                self.refuse(f"sample {number} is on meta, and has no values")
            found.append(Sample(self.op, number, replace_tensors(named, lambda leaf: leaf.detach().cpu())))
        return tuple(found)

    def accepted(self, candidate: FactorRule, samples: tuple[Sample, ...]) -> FactorRule:
        """The rule, if nothing refutes it on the samples.

        Raises:
            ShardingError: SS321, SS322.
        """
        try:
            keys, failures = try_rule(self.op, candidate, samples, gradients=self.gradients)
        except Misfit as error:
            self.refuse(str(error), *error.advice)
        if not failures:
            return evolve(candidate, tried=keys)
        fix = self._fix(candidate, failures, samples)
        raise ShardingError(
            [
                Diagnostic(
                    code="SS321",
                    what=f"the rule of {self.op} is wrong: {failure.claim} over {failure.axes}",
                    why=f"{failure.layouts}\n{failure.problem}\n{failure.reason}",
                    locations=(self.place,),
                    fixes=(fix,) if fix else (),
                    advice=(failure.advice,) if not fix and failure.advice else (),
                )
                for failure in failures
            ]
        )

    def _fix(self, candidate: FactorRule, failures: Sequence[Failure], samples: tuple[Sample, ...]) -> str:
        """The arguments with which the rule passes, where those that failed are taken back."""
        if not isinstance(candidate.notation, str):
            return ""
        known = parse_notation(candidate.notation)
        failed = {failure.factor for failure in failures if failure.factor}
        kept = tuple(group for group in candidate.linear if group not in {failure.group for failure in failures})
        reduced = failed - {name for part in known.outputs for dim in part for name in dim}
        trials: list[tuple[Notation, str]] = []
        if reduced:
            trials += [
                (evolve(known, whole=known.whole | (failed - reduced)), way)
                for way in (SUM, AVG, MAX, MIN)
                if way != candidate.reduction
            ]
        if len(known.outputs) == 1 and len(failed) > 1:
            orders = itertools.permutations(known.outputs[0])
            trials += [(evolve(known, outputs=(order,)), candidate.reduction) for order in orders]
        trials.append((evolve(known, whole=known.whole | failed), candidate.reduction))
        for notation, reduction in trials:
            mended = evolve(candidate, notation=str(notation), linear=kept, reduction=reduction)
            try:
                _, wrong = try_rule(self.op, mended, samples, gradients=self.gradients)
            except Misfit:
                continue
            if not wrong:
                parts = [f'"{notation}"'] if notation != known else []
                parts += [f'reduction="{reduction}"'] if reduction != candidate.reduction else []
                groups = [tuple(sorted(group)) for group in kept]
                shown = [group[0] if len(group) == 1 else group for group in groups]
                parts += [f"linear={shown}"] if kept != candidate.linear else []
                return ", ".join(parts)
        return ""


def _names_or_groups(given: str | Sequence[str | tuple[str, ...]]) -> Sequence[str | tuple[str, ...]]:
    return (given,) if isinstance(given, str) else given
