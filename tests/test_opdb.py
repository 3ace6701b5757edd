"""PyTorch's own samples against the operator rules: a recorded part of what `python -m benchmarks.operators` runs."""

import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import shardspec as ss
from shardspec.layout import MAX, SUM, Layout
from shardspec.rules.operator import RULES
from shardspec.testing.bruteforce import verify_operator
from tests.operators.coverage import Report, cover
from tests.operators.fuzz import fuzz
from tests.operators.planted import APART, PLANTED, by_dry_run, by_fuzz, by_op_db, by_program, planted
from tests.operators.samples import name_of, op_db

aten = torch.ops.aten

RECORDED = (
    "abs", "addmm", "all", "amax", "argmax", "baddbmm", "bmm", "cat", "chunk", "clone", "cumprod", "cumsum",
    "diagonal", "div", "dsplit", "einsum", "expand", "fft.fftn", "fft.irfftn", "fill", "flip", "floor_divide",
    "gather", "index_add", "index_select", "kthvalue", "linalg.vector_norm", "log_softmax", "logsumexp",
    "masked_fill", "matmul", "max", "mean", "mm", "mul", "nansum", "new_full", "nn.functional.adaptive_avg_pool2d",
    "nn.functional.avg_pool2d", "nn.functional.binary_cross_entropy", "nn.functional.conv1d", "nn.functional.conv2d",
    "nn.functional.embedding", "nn.functional.glu", "nn.functional.group_norm", "nn.functional.interpolate",
    "nn.functional.layer_norm", "nn.functional.linear", "nn.functional.max_pool2d", "nn.functional.mse_loss",
    "nn.functional.pad", "nn.functional.pixel_shuffle", "nn.functional.prelu", "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention", "nn.functional.unfold", "permute", "polar", "repeat", "reshape",
    "roll", "scatter", "scatter_add", "softmax", "sort", "split", "squeeze", "stack", "sub", "sum", "take_along_dim",
    "topk", "tril", "unbind", "unflatten", "unsqueeze", "var", "view", "view_as_complex", "where",
)  # fmt: skip
"""The operators of `op_db` of which the suite runs one draw."""

SELDOM = {
    "_fft_c2c", "_fft_c2r", "all", "all.dims", "any", "binary_cross_entropy", "copy_", "fill.Scalar", "group_norm",
    "index_add_", "linalg_vector_norm", "prod", "rms_norm", "var",
}  # fmt: skip
"""Operators that one draw lays out in no way that is right: they need all dims whole, or many operands alike."""


@pytest.fixture(autouse=True, scope="module")
def one_quiet_thread() -> Iterator[None]:
    """Tensors this small are slower on several; what torch warns of in its own samples is no matter."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def test_what_the_rules_accept_of_op_db_is_what_the_ranks_compute():
    """Law: as for the fuzz cases, on samples that were written by others."""
    report = Report()
    chosen = [operator for operator in op_db() if operator.name in RECORDED]
    assert {operator.name for operator in chosen} == set(RECORDED)
    cover(chosen, seed=1, most=1, report=report)
    assert not report.wrong
    tried = {name for name, row in report.rows.items() if row.rule == "own" and row.tried}
    refused = {name for name in tried if not report.rows[name].accepted}
    assert refused <= SELDOM, "a rule that accepts nothing is not tried"
    assert len(tried) >= 100
    assert report.validated >= 500


def test_samples_are_the_same_for_the_same_seed():
    operator = next(one for one in op_db() if name_of(one) == "addmm")
    reports = [Report(), Report()]
    for report in reports:
        cover([operator], seed=3, most=2, report=report)
    assert reports[0].rows["addmm"].accepted == reports[1].rows["addmm"].accepted > 0


def test_the_fuzz_goes_on_where_the_trials_stop():
    """The recorded part of the 20,000 of docs/coverage.md, on seeds that no other test draws."""
    found = fuzz(accepted=300, start=500)
    assert not found.wrong
    assert found.total >= 300


# Planted bugs


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.bug)
def test_a_planted_rule_bug_is_caught(bug):
    """By directed fuzz, by torch's samples where they reach it, and by a program on simulated ranks."""
    assert by_fuzz(bug)
    assert by_op_db(bug)
    assert by_program(bug)


def test_the_dry_run_sees_the_planted_bugs_that_change_a_call():
    found = {bug.bug for bug in PLANTED if by_dry_run(bug)}
    assert found == {
        "a contraction with one operand whole",
        "transposed digits: a view cut from the left",
        "wrong slice offset",
    }


def test_a_planted_rule_is_taken_out_again():
    bug = PLANTED[0]
    right = RULES[bug.target]
    with planted(bug):
        assert RULES[bug.target] is bug.rule
    assert RULES[bug.target] is right
    assert [bug.bug for bug in PLANTED if not bug.samples and by_op_db(bug) != APART] == []


# Found by op_db


MESH = ss.Mesh(tp=2)
TWO = torch.float64


def whole(*shape: int) -> Layout:
    return Layout(tuple((length,) if length != 1 else () for length in shape))


def pending(*shape: int, kind: str = SUM) -> Layout:
    return Layout(whole(*shape).dims, (("tp", kind),))


@pytest.mark.parametrize(
    ("op", "inputs", "layouts", "result"),
    [
        # 0-dim operands: `dim % rank` divided by zero.
        (lambda x: x.softmax(0), [torch.tensor(2.0, dtype=TWO)], [pending()], None),
        (lambda x: x.cumsum(0), [torch.tensor(2.0, dtype=TWO)], [pending()], "[] +tp"),
        (lambda x: x.transpose(0, -1), [torch.tensor(2.0, dtype=TWO)], [pending()], "[] +tp"),
        (torch.addmm, [torch.ones((), dtype=TWO), torch.ones(2, 4, dtype=TWO), torch.ones(4, 2, dtype=TWO)],
         [whole(), Layout((("tp",), (4,))), whole(4, 2)], "[1@tp, 2]"),
        # Two results of a pointwise operator.
        (torch.frexp, [torch.ones(4, 2, dtype=TWO)], [Layout((("tp", 2), (2,)))], "[2@tp, 2], [2@tp, 2]"),
        # The mean of whole numbers is rounded.
        (lambda x: F.avg_pool2d(x, 2), [torch.arange(32).view(2, 4, 4)], [pending(2, 4, 4)], None),
        # Of complex numbers there is no maximum.
        (torch.view_as_complex, [torch.ones(4, 2, dtype=TWO)], [pending(4, 2, kind=MAX)], None),
        (torch.view_as_complex, [torch.ones(4, 2, dtype=TWO)], [pending(4, 2)], "[4] +tp"),
        # Without a dim all elements are read as one row.
        (lambda x, i: torch.take_along_dim(x, i), [torch.ones(4, 2, dtype=TWO), torch.tensor([0, 5])],
         [Layout((("tp", 2), (2,))), whole(2)], None),
        (lambda x, i: x.gather(0, i), [torch.ones((), dtype=TWO), torch.tensor([0])], [pending(), whole(1)], "[1] +tp"),
    ],
)  # fmt: skip
def test_what_op_db_found_stays_mended(op, inputs, layouts, result):
    verdict = verify_operator(op, inputs, layouts, MESH)
    assert verdict.correct, verdict.problem
    assert (", ".join(map(str, verdict.outputs)) if verdict.accepted else None) == result


@pytest.mark.parametrize(
    ("op", "inputs", "specs", "results"),
    [
        (lambda c, x, y: torch.where(c, x, y), [torch.ones(4, 2, dtype=torch.bool), *[torch.ones(4, 2, dtype=TWO)] * 2],
         ["B D", "B D +tp", "B D +tp"], "[4, 2] +tp"),
        (lambda x: F.pad(x, (1, 1)), [torch.ones(4, 2, dtype=TWO)], ["B@tp D"], "[2@tp, 4]"),
        (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), [torch.ones(2, 4, 3, 3, dtype=TWO)],
         ["B C@tp Y X"], "[2, 2@tp, 6, 6]"),
        (lambda x, i: torch.zeros_like(x).scatter_(1, i, 1.0) * x,
         [torch.ones(4, 8, dtype=TWO), torch.zeros(4, 2).long()], ["B@tp E", "B@tp K"], "[2@tp, 8]"),
        (lambda x: (x > 0).sum().float(), [torch.ones(4, 8, dtype=TWO)], ["B@tp E"], "[] +tp"),
        (lambda x: F.one_hot(x, 8), [torch.zeros(4, 2).long()], ["B@tp S"], "[2@tp, 2, 8]"),
        (lambda x: F.normalize(x, p=1.0, dim=0), [torch.ones(4, 8, dtype=TWO)], ["B E@tp"], "[4, 4@tp]"),
        (lambda x, y: torch.zeros_like(x).copy_(y), [torch.ones(4, 8, dtype=TWO)] * 2,
         ["B@tp E", "B@tp E"], "[2@tp, 8]"),
        (lambda x: x.roll(1, 1), [torch.ones(4, 8, dtype=TWO)], ["B@tp E"], "[2@tp, 8]"),
        (lambda x, w, c: F.group_norm(x, 2, w, c), [torch.randn(4, 8, 3, dtype=TWO), *[torch.ones(8, dtype=TWO)] * 2],
         ["B@tp C Y", "C", "C"], "[2@tp, 8, 3]"),
    ],
)  # fmt: skip
def test_what_models_of_vision_and_mixtures_do_is_accepted(op, inputs, specs, results):
    """The layouts of the results are written by hand."""
    verdict = verify_operator(op, inputs, specs, MESH)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem
    assert ", ".join(map(str, verdict.outputs)) == results


def test_one_hot_without_a_number_of_classes_depends_on_values():
    verdict = verify_operator(F.one_hot, [torch.zeros(4, dtype=torch.long)], ["B@tp"], MESH)
    assert not verdict.accepted
    assert verdict.refusal == "one_hot makes a tensor whose shape depends on values"


def test_one_hot_of_constants_needs_no_number_of_classes():
    verdict = verify_operator(lambda x: F.one_hot(torch.arange(4)) * x, [torch.ones(4, 4, dtype=TWO)], ["S E@tp"], MESH)
    assert not verdict.accepted, "the classes are whole"
    assert verify_operator(lambda x: F.one_hot(torch.arange(4)).sum() * x, [torch.ones(4, 4)], ["S E@tp"], MESH).correct


def test_a_batch_norm_over_a_split_batch_is_refused_with_advice():
    x = torch.randn(4, 2, 3, dtype=TWO)
    verdict = verify_operator(lambda x: F.batch_norm(x, None, None, training=True), [x], ["B@tp C Y"], MESH)
    assert not verdict.accepted
    assert "SS304: batch_norm needs the whole of dim 0" in verdict.refusal
