"""Wrong rules that are planted on purpose, and the oracles that must catch them."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from attrs import field, frozen
from torch import Tensor

import shardspec as ss
from shardspec.dryrun import dry_run
from shardspec.kin import Kin
from shardspec.rules.operator import RULES, OperatorRule
from shardspec.rules.parse import Sizes, parse_table
from shardspec.stages import Claims
from shardspec.survey import survey
from shardspec.testing.bruteforce import as_model, record_operator, type_layouts
from tests.operators import wrong
from tests.operators.cases import CASES
from tests.operators.coverage import RAISES, Report, cover
from tests.operators.layouts import choices, joined, renamed
from tests.operators.samples import op_db
from tests.operators.trials import a_trial, verdict_of

aten = torch.ops.aten

FUZZ_TRIALS = 300
"""How many trials of a case a planted bug may survive."""

CAUGHT = "values"
"""Values or gradients differ."""
RAISED = "raises"
"""A rank's parts do not fit each other: torch objects."""
SHAPES = "shapes"
"""The dry run's calls on local shapes are not those that the types imply."""
MISSED = ""
APART = "n/a"
"""The oracle's inputs cannot reach the bug."""


@frozen(eq=False)
class Planted:
    """A wrong rule, with the inputs on which each oracle looks for it."""

    bug: str
    target: Any
    rule: OperatorRule
    case: str
    """The fuzz case that calls the operator."""
    samples: tuple[str, ...]
    """`op_db`'s operators that call it; none where its samples are never laid out so that the rule matters."""
    program: Callable[..., Any]
    """A few operators as a model would write them, without a global size in it."""
    shapes: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...] = field(default=())
    """Inputs of the program that are whole numbers below four."""


@contextlib.contextmanager
def planted(bug: Planted) -> Iterator[None]:
    """The wrong rule in the right one's place."""
    right = RULES[bug.target]
    RULES[bug.target] = bug.rule
    try:
        yield
    finally:
        RULES[bug.target] = right


NO_TABLE = parse_table(ss.Rules(params={}, activations={}))[0]

LOUD = (RuntimeError, AssertionError, IndexError, ValueError)
"""What a rank raises on parts that do not fit: the bug is seen, though not by a value."""


def by_fuzz(bug: Planted) -> str:
    """Directed fuzz: random trials of the operator's case, in the rules' property tests."""
    case = next(case for case in CASES if case.name == bug.case)
    best = MISSED
    with planted(bug):
        for seed in range(FUZZ_TRIALS):
            try:
                if verdict_of(case, a_trial(Random(f"{case.name} {seed}"), case)).problem:
                    return CAUGHT
            except LOUD:
                best = RAISED
    return best


def by_op_db(bug: Planted, most: int = 12) -> str:
    """PyTorch's samples of the operators that call it."""
    if not bug.samples:
        return APART
    operators = [operator for operator in op_db() if operator.name in bug.samples]
    assert operators, f"op_db has none of {bug.samples}"
    best = MISSED
    with planted(bug):
        for seed in range(3):
            report = Report()
            try:
                cover(operators, seed, most, report)
            except LOUD:
                best = RAISED
            if any(RAISES not in wrong.problem for wrong in report.wrong):
                return CAUGHT
            best = RAISED if report.wrong else best
    return best


def by_program(bug: Planted) -> str:
    """A small program on simulated ranks, forward and backward."""
    found = set(_attempts(bug, simulate=True))
    return next((one for one in (CAUGHT, RAISED) if one in found), MISSED)


def by_dry_run(bug: Planted) -> str:
    """The same program run again on local shapes: only what shows in shapes and arguments can be seen."""
    return next((found for found in _attempts(bug, simulate=False) if found), MISSED)


def _attempts(bug: Planted, *, simulate: bool) -> Iterator[str]:
    """For each choice of layouts that the program is accepted with: how the oracle objects, if it does."""
    generator = torch.Generator().manual_seed(0)
    inputs = [_fill(bug, at, shape, generator) for at, shape in enumerate(bug.shapes)]
    program = record_operator(bug.program, inputs)
    rng = Random(bug.bug)
    one = choices(rng, inputs, "tp", 2, 200)
    two = [(rng.choice(one), _on_dp(rng.choice(one))) for _ in range(200)]
    both = [found for left, right in two if (found := joined(rng, left, right, "dp", 2)) is not None]
    with planted(bug):
        for mesh, many in ((ss.Mesh(tp=2), one), (ss.Mesh(dp=2, tp=2), both)):
            for layouts in many:
                attempt = type_layouts(program, layouts, mesh)
                if attempt.refusal:
                    continue
                if simulate:
                    try:
                        yield CAUGHT if attempt.run(bug.program, inputs) else MISSED
                    except LOUD:
                        yield RAISED
                else:
                    names, params = survey(as_model(bug.program, inputs)), attempt.inference.params
                    claims = Claims(NO_TABLE, Kin(), params, {}, Sizes())
                    differences = dry_run(names, attempt.typed, program, claims, {}, {}, None)
                    yield SHAPES if differences else MISSED


def _fill(bug: Planted, at: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    if at in bug.whole:
        return torch.randint(0, 4, tuple(shape), generator=generator)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def _on_dp(layouts: Any) -> Any:
    return tuple(renamed(layout) for layout in layouts)


SQUARE = (4, 8)

PLANTED = (
    Planted(
        "softmax over a split dim accepted", aten.softmax.int, wrong.softmax_of_a_part, "softmax", ("softmax",),
        lambda q, k, v: (q @ k.t()).softmax(-1) @ v, (SQUARE, SQUARE, SQUARE),
    ),
    Planted(
        "pending dropped after a sum", aten.sum.dim_IntList, wrong.sum_that_owes_nothing, "sum", ("sum",),
        lambda x, w: F.linear(x, w).sum(-1), (SQUARE, SQUARE),
    ),
    Planted(
        "a mean as a pending sum", aten.mean.dim, wrong.mean_that_is_a_sum, "mean", ("mean",),
        lambda x: (x * x).mean(-1), (SQUARE,),
    ),
    Planted(
        "a maximum taken as linear", aten.amax.default, wrong.amax_of_a_sum, "amax", ("amax",),
        lambda x, w: F.linear(x, w).amax(-1), (SQUARE, SQUARE),
    ),
    Planted(
        "P * P", aten.mul.Tensor, wrong.product_of_two_sums, "square by mul", ("mul",),
        lambda x, w, v: F.linear(x, w) * F.linear(x, v), (SQUARE, SQUARE, SQUARE),
    ),
    Planted(
        "a sum and a whole added", aten.add.Tensor, wrong.sum_of_a_sum_and_a_whole, "add", ("add",),
        lambda x, w: x + F.linear(x, w), (SQUARE, (8, 8)),
    ),
    Planted(
        "transposed digits: a view cut from the left", aten.view.default, wrong.view_cut_from_the_left, "merge",
        ("view", "reshape"), lambda x: x.view(-1, x.shape[-1]) * 2.0, ((2, 4, 8),),
    ),
    Planted(
        "transposed digits: flatten", aten.reshape.default, wrong.flatten_backwards, "merge the last two",
        ("reshape", "reshape_as"), lambda x: x.reshape(-1) * 2.0, (SQUARE,),
    ),
    Planted(
        "wrong slice offset", aten.slice.Tensor, wrong.slice_at_the_global_start, "slice from behind",
        ("dsplit", "tensor_split", "vsplit"), lambda x: x[4:] * 2.0, ((8, 4),),
    ),
    Planted(
        "cat along a split dim", aten.cat.default, wrong.cat_of_parts, "cat of equals", ("cat",),
        lambda x, y: torch.cat([x, y], -1), (SQUARE, SQUARE),
    ),
    Planted(
        "an embedding's pending dropped", aten.embedding.default, wrong.embedding_that_owes_nothing, "embedding",
        ("nn.functional.embedding",), lambda w, i: F.embedding(i, w), (SQUARE, (4, 2)), (1,),
    ),
    Planted(
        "an embedding's rows off", aten.embedding.default, wrong.embedding_of_global_rows, "embedding",
        ("nn.functional.embedding",), lambda w, i: F.embedding(i, w), (SQUARE, (4, 2)), (1,),
    ),
    Planted(
        "heads that do not belong together", aten.scaled_dot_product_attention.default, wrong.attention_to_other_heads,
        "grouped attention", (),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        ((2, 8, 2, 4), (2, 4, 2, 4), (2, 4, 2, 4)),
    ),
    Planted(
        "a gradient not owed", aten.rms_norm.default, wrong.weight_read_in_part, "rms norm",
        ("nn.functional.rms_norm",), lambda x, w: F.rms_norm(x, (x.shape[-1],), w), (SQUARE, (8,)),
    ),
    Planted(
        "a pending condition", aten.where.self, wrong.where_with_a_pending_condition, "where", ("where",),
        lambda x, w, y: torch.where(F.linear(x, w) > 0, x, y), (SQUARE, (8, 8), SQUARE),
    ),
    Planted(
        "early return on 0-dim operands", aten.mul.Tensor, wrong.first_operand_alone, "scaled by a 0-dim", ("mul",),
        lambda x, s: x * s.sum(), (SQUARE, (8,)),
    ),
    Planted(
        "a whole operand meets a split one", aten.mul.Tensor, wrong.whole_meets_split, "mul", ("mul",),
        lambda x, y: x * y.sum(0), ((4, 2), (4, 2)),
    ),
    Planted(
        "a contraction with one operand whole", aten.mm.default, wrong.product_of_a_part, "mm", ("mm",),
        lambda x, w: torch.mm(x, w), (SQUARE, (8, 4)),
    ),
    Planted(
        "cumsum over a split dim", aten.cumsum.default, wrong.along_a_part, "cumsum", ("cumsum",),
        lambda x: (x * x).cumsum(-1), (SQUARE,),
    ),
    Planted(
        "a sort of parts", aten.sort.default, wrong.along_a_part_twice, "sort", ("sort",),
        lambda x: x.sort(-1), (SQUARE,),
    ),
    Planted(
        "repeat's digits transposed", aten.repeat.default, wrong.repeat_after, "repeat", ("repeat",),
        lambda x: x.repeat(2, 1), (SQUARE,),
    ),
    Planted(
        "expand's new dim split", aten.expand.default, wrong.expand_of_a_pending, "expand and meet", ("expand",),
        lambda x, w: F.linear(x, w).unsqueeze(1).expand(-1, 2, -1) * 2.0, (SQUARE, SQUARE),
    ),
    Planted(
        "an index past the part", aten.index_select.default, wrong.rows_of_a_part, "index select", ("index_select",),
        lambda x, i: x.index_select(0, i), (SQUARE, (2,)), (1,),
    ),
    Planted(
        "a product that owes nothing", aten.linear.default, wrong.linear_that_owes_nothing, "linear",
        ("nn.functional.linear",), lambda x, w: F.linear(x, w), (SQUARE, SQUARE),
    ),
    Planted(
        "a number padded to shares", aten.constant_pad_nd.default, wrong.pad_of_shares, "pad with a number",
        ("nn.functional.pad",), lambda x, w: F.pad(F.linear(x, w), (1, 0), value=3.0), (SQUARE, SQUARE),
    ),
    Planted(
        "scatter into a part", aten.scatter.value, wrong.scatter_into_a_part, "scatter of numbers", ("scatter",),
        lambda x, i: x.scatter(1, i, 0.0), (SQUARE, (4, 2)), (1,),
    ),
)  # fmt: skip
