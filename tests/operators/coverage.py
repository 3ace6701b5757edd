"""What the rules say of `op_db`'s samples laid out in many ways, and whether it is what the ranks compute."""

from collections.abc import Iterable
from random import Random
from typing import Any

import torch
from attrs import define, field, frozen

import shardspec as ss
from shardspec.infer import Issue
from shardspec.layout import MAX, MIN
from shardspec.nests import tensor_leaves
from shardspec.program import Node, Program, tensors
from shardspec.rules.operator import RULES
from shardspec.rules.pointwise import is_pointwise
from shardspec.testing.bruteforce import Attempt, record_operator, type_layouts
from shardspec.tracing import HostRead
from tests.operators.layouts import Layouts, axis_sizes, choices, joined, renamed
from tests.operators.samples import Sample, samples
from tests.operators.soundness import some_layout_is_sound

TYPED = 16
"""Choices of layouts that a sample is typed on, on each size of an axis."""

RUN = 2
"""Of those that are accepted, how many are run; and as many on two axes."""

ASKED = 6
"""Of those that are refused, how many are searched for a layout that would be sound; in the first draw only."""


RAISES = "a rank cannot run it"
"""How a problem begins where torch refuses a rank's parts."""


@define(eq=False)
class Row:
    """One ATen operator's counts."""

    rule: str = ""
    """"own", or "tag" where torch's tag makes it pointwise; nothing where the typing does not know it."""
    samples: int = 0
    """Samples that call it with some operand split or pending."""
    tried: int = 0
    """Calls so typed."""
    accepted: int = 0
    validated: int = 0
    """Accepted calls of programs that all ranks ran, values and gradients agreeing with the whole's."""
    sound: int = 0
    """Refused calls for which some layout of the results is sound; an upper bound, and of those asked only."""
    asked: int = 0
    """Samples of the draw in which refusals were asked."""
    over: int = 0
    """Of those asked, the ones of which every call was refused although some layout was sound."""


@frozen
class Wrong:
    """An acceptance that the ranks do not keep."""

    sample: str
    mesh: str
    layouts: str
    problem: str


@define(eq=False)
class Report:
    """Counts of one or several runs."""

    rows: dict[str, Row] = field(factory=dict)
    """ATen operator -> its counts."""
    wrong: list[Wrong] = field(factory=list)
    names: set[str] = field(factory=set)
    """`op_db`'s operators of which a sample was recorded."""
    unruled: set[str] = field(factory=set)
    """Of those, the ones that call an operator without a rule."""
    skipped: dict[str, str] = field(factory=dict)
    """`op_db`'s operators of which no sample was recorded -> the last reason."""
    typed: int = 0
    accepted: int = 0
    validated: int = 0
    owing: int = 0
    """Refused for gradients alone."""

    def row(self, func: Any) -> Row:
        """An operator's counts."""
        rule = "own" if func in RULES else "tag" if is_pointwise(func) else ""
        return self.rows.setdefault(aten_name(func), Row(rule=rule))

    def add(self, other: "Report") -> None:
        """Another draw's counts as well."""
        for name, row in other.rows.items():
            mine = self.rows.setdefault(name, Row(rule=row.rule))
            for count in ("samples", "tried", "accepted", "validated", "sound", "over", "asked"):
                setattr(mine, count, getattr(mine, count) + getattr(row, count))
        for count in ("typed", "accepted", "validated", "owing"):
            setattr(self, count, getattr(self, count) + getattr(other, count))
        self.wrong += other.wrong
        self.names |= other.names
        self.unruled |= other.unruled
        self.skipped = other.skipped | self.skipped


def aten_name(func: Any) -> str:
    """An operator's name as the reports have it: `add.Tensor`, `relu`."""
    return str(func).removeprefix("aten.").removesuffix(".default") if hasattr(func, "_schema") else func.__name__


def has_rule(func: Any) -> bool:
    """Whether the typing knows the operator."""
    return func in RULES or is_pointwise(func)


def cover(operators: Iterable[Any], seed: int, most: int, report: Report) -> None:
    """Add to a report what the rules say of at most `most` samples of each of `op_db`'s operators."""
    for operator in operators:
        for drawn in samples(operator, seed, most):
            try:
                sample, program = _recorded(drawn)
                trials = _Trials(sample, program, Random(f"{sample.name} {seed}"), seed, report)
            except HostRead as error:
                report.skipped.setdefault(operator.name, str(error))
                continue
            except Exception as error:  # meta kernels fail in their own ways
                report.skipped.setdefault(operator.name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
                continue
            if not tensors(program.result) or any(v.kind == "constant" and v.data is None for v in program.values):
                continue  # no result, or a constant that torch makes on meta alone: lists that index
            report.names.add(operator.name)
            if any(not has_rule(node.func) for node in program.nodes):
                report.unruled.add(operator.name)
            trials.run()


def _recorded(sample: Sample) -> tuple[Sample, Program]:
    try:
        return sample, record_operator(sample.call, sample.inputs)
    except RuntimeError as error:
        if "not differentiable with respect to" not in str(error):
            raise
        return sample.with_constants(), record_operator(sample.with_constants().call, sample.inputs)


@define(eq=False)
class _Trials:
    """One sample on many layouts."""

    sample: Sample
    program: Program
    rng: Random
    seed: int
    report: Report
    met: set[Any] = field(factory=set)
    """Operators that were called with an operand split or pending."""
    passed: set[Any] = field(factory=set)
    sound: set[Any] = field(factory=set)
    asked: dict[Any, int] = field(factory=dict)
    differentiable: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.differentiable = _has_gradient(self.sample)

    def run(self) -> None:
        accepted: list[tuple[int, Layouts]] = []
        for size in axis_sizes(self.sample.inputs)[:2]:
            mesh = ss.Mesh(tp=size)
            fine = [
                attempt
                for layouts in choices(self.rng, self.sample.inputs, "tp", size, TYPED)
                if not (attempt := self._type(layouts, mesh)).refusal
            ]
            accepted += [(size, tuple(attempt.layouts.values())) for attempt in fine]
            for attempt in self.rng.sample(fine, min(RUN, len(fine))):
                self._run(attempt)
        self._on_two_axes(accepted)
        for func in self.met:
            row = self.report.row(func)
            row.samples += 1
            row.asked += self.seed == 0
            row.over += func in self.sound and func not in self.passed

    def _on_two_axes(self, accepted: list[tuple[int, Layouts]]) -> None:
        for _ in range(RUN if accepted else 0):
            (one, left), (two, right) = self.rng.choice(accepted), self.rng.choice(accepted)
            if one * two > 10:
                continue
            other = tuple(renamed(layout) for layout in right)
            layouts = joined(self.rng, left, other, "dp", two)
            if layouts is not None:
                attempt = self._type(layouts, ss.Mesh(dp=two, tp=one))
                if not attempt.refusal:
                    self._run(attempt)

    def _type(self, layouts: Layouts, mesh: ss.Mesh) -> Attempt:
        self.report.typed += 1
        attempt = type_layouts(self.program, layouts, mesh)
        self.report.owing += attempt.refusal.startswith("SS307")
        self.report.accepted += not attempt.refusal
        for position, node in self._tried(attempt):
            self.met.add(node.func)
            row = self.report.row(node.func)
            row.tried += 1
            if position in attempt.typed.consumed:
                row.accepted += 1
                self.passed.add(node.func)
        for issue in attempt.inference.issues if len(mesh.shape) == 1 and self.seed == 0 else ():
            self._ask(issue, mesh)
        return attempt

    def _tried(self, attempt: Attempt) -> list[tuple[int, Node]]:
        """The calls with an operand that is split or pending."""
        found: list[tuple[int, Node]] = []
        for position, node in enumerate(self.program.nodes):
            kinds = [attempt.typed.types[ref.index] for ref in tensors(node.args) + tensors(node.kwargs)]
            if all(kinds) and (not kinds or any(kind.layout.sharded or kind.layout.pending for kind in kinds if kind)):
                found.append((position, node))
        return found

    def _ask(self, issue: Issue, mesh: ss.Mesh) -> None:
        node = issue.typed.graph.nodes[issue.node]
        func, kinds = node.func, [issue.typed.types[ref.index] for ref in tensors(node.args) + tensors(node.kwargs)]
        if any(kind in (MAX, MIN) for one in kinds if one for _, kind in one.layout.pending):
            return  # monotone functions pass a pending maximum, which no model leaves pending
        self.asked[func] = self.asked.get(func, 0) + 1
        if self.asked[func] <= ASKED and some_layout_is_sound(issue, self.sample.inputs, dict(mesh.shape)):
            self.report.row(func).sound += 1
            self.sound.add(func)

    def _run(self, attempt: Attempt) -> None:
        try:
            problem = attempt.run(self.sample.call, self.sample.inputs, seed=self.seed, gradients=self.differentiable)
        except ValueError as error:
            if "not simulated" not in str(error):
                raise
            return
        except NotImplementedError:  # torch has no kernel for the dtype
            return
        except (RuntimeError, IndexError, TypeError) as error:
            problem = f"{RAISES}: {str(error).splitlines()[0]}"
        if problem:
            layouts = ", ".join(map(str, attempt.layouts.values()))
            self.report.wrong.append(Wrong(str(self.sample), str(dict(attempt.mesh.shape)), layouts, problem))
            return
        self.report.validated += 1
        for _, node in self._tried(attempt):
            self.report.row(node.func).validated += 1


def _has_gradient(sample: Sample) -> bool:
    """Whether torch knows a backward of the operator."""
    leaves = [one.detach().clone().requires_grad_(one.is_floating_point()) for one in sample.inputs]
    ends = [out for out in tensor_leaves(sample.call(*(leaf.clone() for leaf in leaves))) if out.requires_grad]
    starts = [leaf for leaf in leaves if leaf.requires_grad]
    try:
        torch.autograd.grad(ends, starts, [torch.zeros_like(end) for end in ends], allow_unused=True)
    except RuntimeError:
        return False
    return True
