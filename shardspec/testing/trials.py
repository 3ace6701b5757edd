"""Every layout that a rule in factor notation accepts on sample calls, brute-forced."""

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from shardspec.layout import AVG, SUM, DimLayout, Layout, canonical, flatten
from shardspec.mesh import Mesh
from shardspec.nests import replace_tensors, tensor_leaves
from shardspec.recording import trace
from shardspec.rules.factors import LEAD, FactorRule, Flat, Notation, NotationError, learn, spread
from shardspec.rules.operator import RULES, named_arguments
from shardspec.survey import survey
from shardspec.testing.bruteforce import Operator, verify_operator

ONE_AXIS = (Mesh(tp=2), Mesh(tp=3))
TWO_AXES = Mesh(dp=2, tp=2)
"""Where a rule is tried: every layout over one axis, then every pair."""

PARTS = 4
"""A sample tells whether a factor may be split if this divides its size: so two axes can, in any order."""


class Misfit(Exception):
    """A rule cannot be tried on the samples; the message says why."""

    def __init__(self, message: str, *advice: str) -> None:
        super().__init__(message)
        self.advice = advice


@frozen(eq=False)
class Sample:
    """One call of an operator, its arguments by name."""

    op: Any
    number: int
    named: Mapping[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, in order."""
        return tensor_leaves(dict(self.named))

    def call(self, *given: Tensor) -> Any:
        """The operator with other tensors in the place of the sample's."""
        rest = iter(given)
        return self.op(**replace_tensors(dict(self.named), lambda _: next(rest)))


@frozen(kw_only=True)
class Failure:
    """One thing that a rule claims and that the ranks refute."""

    claim: str
    axes: str
    layouts: str
    problem: str
    reason: str
    advice: str = ""
    factor: str = ""
    group: frozenset[str] = frozenset()


@frozen
class Split:
    """An axis splits a factor."""

    factor: str


@frozen
class Pends:
    """Over an axis some operands are still to be reduced."""

    kind: str
    operands: tuple[int, ...]
    group: frozenset[str]


State = Split | Pends


def try_rule(
    op: Any, rule: FactorRule, samples: Sequence[Sample], *, gradients: bool
) -> tuple[frozenset[Any], list[Failure]]:
    """Brute-force a rule on every layout that it accepts on the samples, over one axis and over each pair.

    Returns:
        What the calls of the samples have beside tensors, and what is wrong: the first of each claim.

    Raises:
        Misfit: for samples that say nothing, or an operator that does not run on them.
    """
    with _tentative(op, rule):
        fitted = [_fit(rule, sample, gradients=gradients) for sample in samples]
        _check_covered(fitted)
        found: dict[Any, Failure] = {}
        for each in fitted:
            for mesh in ONE_AXIS:
                for state in each.states(mesh["tp"]):
                    claim = state if isinstance(state, Split) else state.group
                    failure = (
                        None if claim in found else _first_failure(rule, each, mesh, {"tp": state}, gradients=gradients)
                    )
                    found.update({claim: failure} if failure else {})
        for each in fitted if not found else ():
            for pair in itertools.product(each.states(2), repeat=2):
                states: dict[str, State] = dict(zip(TWO_AXES.axes, pair, strict=True))
                failure = _first_failure(rule, each, TWO_AXES, states, gradients=gradients)
                if failure:
                    return frozenset(each.key for each in fitted), [failure]
    return frozenset(each.key for each in fitted), list(found.values())


@contextmanager
def _tentative(op: Any, rule: FactorRule) -> Generator[None]:
    """Have a rule be the operator's for a while."""
    before = RULES.get(op)
    RULES[op] = rule
    try:
        yield
    finally:
        if before is None:
            del RULES[op]
        else:
            RULES[op] = before


@frozen(eq=False, kw_only=True)
class Fitted:
    """A sample with what the notation says of it."""

    sample: Sample
    notation: Notation
    labels: Flat
    known: Mapping[str, int]
    names: tuple[str, ...]
    """What each operand is called."""
    groups: tuple[tuple[frozenset[str], tuple[int, ...]], ...]
    """The arguments in which the operator is linear together, and which operands they are."""
    key: Any

    @property
    def splittable(self) -> tuple[str, ...]:
        """The factors that the rule lets be split, and that an operand has."""
        names = dict.fromkeys(name for part in self.labels for dim in part for name in dim)
        whole = self.notation.whole
        return tuple(
            name
            for name in names
            if not name.isdecimal() and name not in whole and not (name.startswith(LEAD) and LEAD in whole)
        )

    def states(self, size: int) -> list[State]:
        """What an axis of that size can do to the operands."""
        split: list[State] = [
            Split(name) for name in self.splittable if self.known[name] % size == 0 and self.known[name]
        ]
        pending: list[State] = []
        floating = [tensor.is_floating_point() for tensor in self.sample.tensors]
        for group, operands in self.groups:
            if not operands:
                continue
            pending.append(Pends(SUM, operands, group))
            if all(floating[at] for at in operands):
                pending.append(Pends(AVG, operands, group))
                pending += [Pends(AVG, (at,), group) for at in operands if len(operands) > 1]
        return split + pending


def _fit(rule: FactorRule, sample: Sample, *, gradients: bool) -> Fitted:
    """What the notation says of a sample; the operator runs on the whole of it, forward and backward."""
    title = f"sample {sample.number}"
    made = _whole(sample, title, gradients=gradients)
    try:
        program = trace(survey(Operator(sample.call, sample.tensors)), {})
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise Misfit(
            f"{title}: the operator does not run on meta: {_line(error)}", "give it a shape function: register_fake"
        ) from error
    node = program.nodes[0]
    shapes = [tuple(program.values[index].shape) for index in node.outputs if index is not None]
    if shapes != [tuple(leaf.shape) for leaf in made]:
        raise Misfit(
            f"{title}: on meta the results have shapes {shapes}, in truth {[tuple(leaf.shape) for leaf in made]}"
        )
    named = named_arguments(node)
    try:
        notation = rule.parsed(
            replace_tensors(dict(sample.named), lambda leaf: leaf.to("meta")) | _absent(named, sample)
        )
        parts, places = rule.operands(notation, named)
        given = [tuple(tensor.shape) for tensor in sample.tensors]
        labels, lead = spread(parts, given)
        known: dict[str, int] = rule.sizes_of(named)
        learn(labels, given, known)
        if len(shapes) != len(notation.outputs):
            raise NotationError(f"it names {len(notation.outputs)} results, and the operator makes {len(shapes)}")
        learn(spread(notation.outputs, shapes, lead)[0], shapes, known)
    except NotationError as error:
        raise Misfit(f"{title}: the notation does not fit: {error}") from error
    groups = tuple(
        (group, tuple(at for name in places if name in group for at in places[name])) for group in rule.linear
    )
    names = tuple(
        name if len(at) == 1 else f"{name}[{number}]" for name, at in places.items() for number in range(len(at))
    )
    fitted = Fitted(
        sample=sample, notation=notation, labels=labels, known=known, names=names, groups=groups, key=rule.key(named)
    )
    _check_telling(fitted, title)
    return fitted


def _absent(named: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
    """The arguments that a sample leaves at their defaults."""
    return {name: value for name, value in named.items() if name not in sample.named}


def _whole(sample: Sample, title: str, *, gradients: bool) -> list[Tensor]:
    """The operator's results on the whole; its backward runs."""
    leaves = [tensor.clone().requires_grad_(tensor.is_floating_point()) for tensor in sample.tensors]
    try:
        made = tensor_leaves(sample.call(*leaves))
    except Exception as error:
        raise Misfit(f"{title}: the operator fails: {_line(error)}") from error
    if not made:
        raise Misfit(f"{title}: the operator makes no tensor")
    if any(bool(leaf.isnan().any()) for leaf in made if leaf.is_floating_point()):
        raise Misfit(f"{title}: a result holds NaN, which is equal to nothing")
    live = [leaf for leaf in made if leaf.requires_grad]
    problem = "" if live else "its results have no gradient"
    if live:
        try:
            torch.autograd.grad(
                live,
                [leaf for leaf in leaves if leaf.requires_grad],
                list(map(torch.ones_like, live)),
                allow_unused=True,
            )
        except Exception as error:
            problem = _line(error)
    wanted = any(leaf.requires_grad for leaf in leaves)
    if gradients and problem and wanted and any(leaf.is_floating_point() for leaf in made):
        raise Misfit(
            f"{title}: the operator has no backward that runs: {problem}",
            "register one (register_autograd); or give gradients=False, and torch raises where one is asked for",
        )
    if not gradients and live and not problem:
        raise Misfit(f"{title}: gradients=False, and the operator has a backward", "leave gradients=False out")
    return made


def _check_telling(fitted: Fitted, title: str) -> None:
    """A tensor that is the same all along a dim does not tell its parts apart."""
    splittable = set(fitted.splittable)
    for tensor, dims, name in zip(fitted.sample.tensors, fitted.labels, fitted.names, strict=True):
        for at, dim in enumerate(dims):
            may = not splittable.isdisjoint(dim) and tensor.shape[at] > 1
            if may and torch.equal(tensor, tensor.narrow(at, 0, 1).expand_as(tensor)):
                raise Misfit(
                    f"{title}: {name} is the same all along dim {at}, so that its parts are all alike",
                    "give random values",
                )


def _check_covered(fitted: Sequence[Fitted]) -> None:
    """Every factor that may be split is, by two axes, in one of the samples."""
    for name in dict.fromkeys(name for each in fitted for name in each.splittable):
        found = [each.known[name] for each in fitted if name in each.splittable]
        if not any(size and size % PARTS == 0 for size in found):
            raise Misfit(
                f"no sample can split {name}: its sizes are {', '.join(map(str, found))}",
                f"give a sample where {name} is a multiple of {PARTS}, or write !{name} if it must not be split",
            )


def _first_failure(
    rule: FactorRule, fitted: Fitted, mesh: Mesh, states: Mapping[str, State], *, gradients: bool
) -> Failure | None:
    """The first layout on which the ranks refute the rule."""
    for layouts in arrangements(fitted, mesh, states):
        try:
            verdict = verify_operator(
                fitted.sample.call, fitted.sample.tensors, layouts, mesh, seed=fitted.sample.number, gradients=gradients
            )
            accepted, problem, outputs = verdict.accepted, verdict.problem, verdict.outputs
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError, NotImplementedError) as error:
            accepted, problem, outputs = True, f"the operator fails on a rank's part: {_line(error)}", ()
        if accepted and problem:
            given = ", ".join(f"{name} {layout}" for name, layout in zip(fitted.names, layouts, strict=True))
            made = ", ".join(map(str, outputs))
            return _failure(rule, fitted, mesh, states, f"{given} -> {made}" if made else given, problem)
    return None


def arrangements(fitted: Fitted, mesh: Mesh, states: Mapping[str, State]) -> Iterator[list[Layout]]:
    """The operands' layouts with axes in these states: every order, and every stride."""
    axes: dict[str, list[str]] = {}
    for axis, state in states.items():
        if isinstance(state, Split):
            axes.setdefault(state.factor, []).append(axis)
    choices = [digits_of(fitted.known[name], on, mesh) for name, on in axes.items()]
    for chosen in itertools.product(*choices):
        digits = {
            **{name: canonical((size,)) for name, size in fitted.known.items()},
            **dict(zip(axes, chosen, strict=True)),
        }
        found: list[Layout] = []
        for operand, dims in enumerate(fitted.labels):
            pending = [
                (axis, state.kind)
                for axis, state in states.items()
                if isinstance(state, Pends) and operand in state.operands
            ]
            found.append(Layout(tuple(flatten(digits[name] for name in dim) for dim in dims), tuple(sorted(pending))))
        yield found


def digits_of(size: int, axes: Sequence[str], mesh: Mesh) -> list[DimLayout]:
    """Every way to write a size with axes among its digits; none where they do not divide it."""
    rest, uneven = divmod(size, prod(mesh[axis] for axis in axes))
    if uneven or not rest:
        return []
    found: dict[DimLayout, None] = {}
    for order in itertools.permutations(axes):
        for extents in _factored(rest, len(order) + 1):
            pairs = zip(extents, order, strict=False)
            found[canonical([*(digit for pair in pairs for digit in pair), extents[-1]])] = None
    return list(found)


def _factored(size: int, count: int) -> Iterator[tuple[int, ...]]:
    """The ordered ways to write a size as a product of `count` numbers."""
    if count == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            for others in _factored(size // first, count - 1):
                yield (first, *others)


def _failure(
    rule: FactorRule, fitted: Fitted, mesh: Mesh, states: Mapping[str, State], layouts: str, problem: str
) -> Failure:
    claims: list[str] = []
    reasons: list[str] = []
    advice: list[str] = []
    made = {name for part in fitted.notation.outputs for dim in part for name in dim}
    for state in dict.fromkeys(states.values()):
        if isinstance(state, Split):
            claims.append(f"{state.factor} split")
            if state.factor in made or (state.factor.startswith(LEAD) and LEAD in made):
                reasons.append(
                    f"the notation lets {state.factor} be split, but what the operator makes of a part differs"
                )
                advice.append(f"mark it as whole: !{state.factor}")
            else:
                reasons.append(
                    f"the notation says that the {rule.reduction} over {state.factor} is all that is missing"
                )
                advice.append(f"mark it as whole (!{state.factor}), or give another reduction=")
        else:
            held = " and ".join(fitted.names[at] for at in state.operands)
            claims.append(f"{held} pending {state.kind}")
            reasons.append(f"linear= says that {held} may be passed in shares, but the results do not add up")
            advice.append(f"take {held} out of linear=")
    first = next(iter(states.values()))
    alone = len(states) == 1
    return Failure(
        claim=", ".join(claims),
        axes=str(mesh),
        layouts=layouts,
        problem=problem,
        reason="\n".join(reasons),
        advice="; ".join(advice),
        factor=first.factor if alone and isinstance(first, Split) else "",
        group=first.group if alone and isinstance(first, Pends) else frozenset(),
    )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
