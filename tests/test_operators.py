"""Operator rules by brute force: what the rules accept is what the ranks compute, forward and backward."""

import os
import types
from collections.abc import Iterator
from random import Random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor

import shardspec as ss
from shardspec.layout import Layout
from shardspec.testing.bruteforce import Verdict, verify_operator
from tests.operators.cases import CASES
from tests.operators.trials import a_trial, fill, verdict_of

TRIALS = int(os.environ.get("SHARDSPEC_TRIALS", "22"))
TALLY: dict[str, tuple[int, int]] = {}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_rules_accept_is_what_the_ranks_compute(case):
    """Law: op(parts of x) are parts of op(x) under the layout that the rules claim, and so are the gradients."""
    accepted = 0
    for seed in range(TRIALS):
        trial = a_trial(Random(f"{case.name} {seed}"), case)
        verdict = verdict_of(case, trial)
        assert verdict.correct, f"{trial}\n{verdict.problem}"
        accepted += verdict.accepted
    TALLY[case.name] = (accepted, TRIALS)
    assert accepted >= TRIALS // 10, "the trials say nothing where most are refused"


@given(st.sampled_from(CASES), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_so_it_is_where_hypothesis_looks(case, rng):
    """Law: the same, over all operators; a counterexample is shrunk."""
    trial = a_trial(rng, case)
    note(f"{case.name}: {trial}")
    assert not verdict_of(case, trial).problem


# The report


MESH = ss.Mesh(dp=2, tp=2)


def test_a_verdict_tells_the_layout_that_was_accepted():
    x, w = torch.randn(4, 6, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    verdict = verify_operator(F.linear, [x, w], ["B@dp I@tp", "O I@tp"], MESH)
    assert verdict == Verdict(accepted=True, outputs=(Layout((("dp", 2), (8,)), (("tp", "sum"),)),))


def test_a_verdict_tells_why_an_operator_is_refused():
    verdict = verify_operator(lambda x: x.softmax(-1), [torch.randn(4, 6)], [ss.P(None, "tp")], MESH)
    assert not verdict.accepted
    assert verdict.correct
    assert verdict.refusal.startswith("SS304: softmax needs the whole of dim 1")


def test_specs_that_do_not_fit_are_an_error():
    with pytest.raises(ss.ShardingError, match="F of 5 cannot be split over tp=2"):
        verify_operator(torch.neg, [torch.randn(4, 5)], ["B F@tp"], MESH)
    with pytest.raises(ss.ShardingError, match="the spec has 1 dims"):
        verify_operator(torch.neg, [torch.randn(4, 5)], ["B"], MESH)
    with pytest.raises(ValueError, match="1 inputs, 2 layouts"):
        verify_operator(torch.neg, [torch.randn(4)], ["B", "B"], MESH)


# Found by brute force


def grouped(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k, enable_gqa=True)


def heads(*digits: int | str) -> Layout:
    return Layout(((), digits, (3,), (2,)))


@pytest.mark.parametrize(
    ("op", "shapes", "layouts_", "refused"),
    [
        # The dtype's operand was taken for an addend: what it owed was said of the result.
        (lambda x, y: x.type_as(y), [(2, 2), (4,)], [Layout(((2,), (2,))), Layout(((4,),), (("dp", "sum"),))], False),
        # A dim of two over two ranks has one row on each, and went.
        (torch.squeeze, [(2, 3)], [Layout((("tp",), (3,)))], True),
        (lambda x: x.squeeze(0), [(2, 3)], [Layout((("tp",), (3,)))], True),
        (lambda x: x.squeeze(1), [(2, 1)], [Layout((("tp",), ()))], False),
        # Head 1 of the queries' four on rank 1 is the third of all: it reads the second of the keys' two.
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads(4, "tp"), heads(2, "tp")], True),
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads(2, "tp", 2), heads(2, "tp")], False),
        (grouped, [(1, 8, 3, 2), (1, 4, 3, 2)], [heads("tp", 4), heads("tp", 2)], False),
        # Without elements there are no groups of dims to cut.
        (lambda x: x.view(0, 2), [(2, 0)], [Layout(((2,), (0,)))], False),
    ],
)
def test_a_found_counterexample_stays_mended(op, shapes, layouts_, refused):
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    verdict = verify_operator(op, inputs, layouts_, MESH)
    assert verdict.correct
    assert verdict.accepted == (not refused)


# What is right is accepted


@pytest.mark.parametrize(
    ("name", "specs", "outputs"),
    [
        ("add of a vector", ["B@dp S@cp D@tp", "D@tp"], "[2@dp, 2@cp, 2@tp]"),
        ("linear", ["B@dp S@cp I", "O@tp I"], "[2@dp, 2@cp, 2@tp]"),
        ("linear", ["B@dp S@cp I@tp", "O I@tp"], "[2@dp, 2@cp, 4] +tp"),
        ("linear with a bias", ["B@dp I@tp", "O I@tp", "O +tp"], "[2@dp, 4] +tp"),
        ("gated", ["B@dp D", "F@tp D", "F@tp D", "D F@tp"], "[2@dp, 4] +tp"),
        ("fused projection", ["B@dp D", "(2 F@tp) D"], "[2@dp, 1@tp], [2@dp, 1@tp]"),
        ("rms norm", ["B@dp S@(cp,tp) D", "D"], "[2@dp, cp.tp, 4]"),
        ("merge", ["B@dp S@cp D@tp"], "[dp.2.cp.2, 2@tp]"),
        ("there and back", ["B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("transpose and merge", ["B@dp H@tp S E"], "[2@dp, 4, 8@tp]"),
        ("expand and meet", ["B@dp 1 D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("expand by a new dim and meet", ["D@tp", "B@dp S@cp D@tp"], "[2@dp, 2@cp, 2@tp]"),
        ("expand, merge and meet", ["B@dp 1 D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("repeated heads, merged", ["B@dp K@tp E"], "[2@dp, 4@tp, 4]"),
        ("repeat by a new dim and meet", ["D", "B@dp S@cp D"], "[2@dp, 2@cp, 4]"),
        ("full", ["B@dp D@tp"], "[2@dp, 2@tp]"),
        ("full, viewed", ["B@dp D@tp"], "[2@dp, 2@tp]"),
        ("embedding", ["V@tp D", "B@dp S@cp"], "[2@dp, 2@cp, 4] +tp"),
        ("gather", ["B@dp V", "B@dp S@cp"], "[2@dp, 2@cp]"),
        ("cross entropy", ["B@dp S@cp V@tp", "B@dp S@cp"], "[] +cp +dp, [] +cp +dp"),
        ("causal attention", ["B@dp H@tp S E", "B@dp H@tp S E", "B@dp H@tp S E"], "[2@dp, 2@tp, 4, 4]"),
        ("attention of many to one head", ["B@dp H@tp S E", "B@dp 1 T E", "B@dp 1 T E"], "[2@dp, 2@tp, 4, 4]"),
        ("rope", ["B@dp S@cp H@tp E", "S@cp E"], "[2@dp, 2@cp, 2@tp, 8]"),
        ("mean", ["B@dp S@cp D"], "[2@dp, 4] +cp:avg"),
        ("where", ["B@dp D@tp", "B@dp D@tp", "B@dp D@tp"], "[2@dp, 2@tp]"),
        ("causal mask", ["B@dp S S"], "[2@dp, 4, 4]"),
        ("conv2d", ["B@dp I@tp X Y", "O I@tp", "O +tp"], "[2@dp, 4, 4, 4] +tp"),
    ],
)  # fmt: skip
def test_what_llama_like_models_do_is_accepted(name, specs, outputs):
    """Each dim is of 4 (a fused one of 4 too); the layouts of the results are written by hand."""
    case = next(case for case in CASES if case.name == name)
    operands = [operand.replace("!", "").split() for operand in case.labels.split(",")]
    lengths = types.SimpleNamespace(**dict.fromkeys({label for operand in operands for label in operand} - {"1"}, 4))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        fill([1 if label == "1" else 4 for label in operand], (case.make + " " * 9)[number], lengths, generator)
        for number, operand in enumerate(operands)
    ]
    mesh = ss.Mesh(dp=2, cp=2, tp=2)
    verdict = verify_operator(lambda *tensors: case.op(tensors, lengths), inputs, specs, mesh)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem
    assert ", ".join(map(str, verdict.outputs)) == outputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.int64])
def test_what_is_written_over_owes_nothing_of_what_it_was(dtype):
    """A complete tensor into one that is still to be summed: found by op_db, matrix_power to the power 0."""
    x, y = torch.arange(4).to(dtype), torch.ones(4, dtype=dtype)
    pending = Layout(((4,),), (("tp", "sum"),))
    verdict = verify_operator(lambda a, b: a.clone().copy_(b), [x, y], [pending, Layout(((4,),))], ss.Mesh(tp=2))
    assert not verdict.accepted
    both = verify_operator(lambda a, b: a.clone().copy_(b), [x, y], [pending, pending], ss.Mesh(tp=2))
    assert both.accepted, both.refusal
    assert both.correct, both.problem
