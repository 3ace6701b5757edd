"""Direct sums by brute force: what the rules accept of them is what the ranks compute, forward and backward."""

import itertools
import os
import types
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

import shardspec as ss
from shardspec.layout import Layout, Sum, is_sum
from shardspec.rules.fit import layout_of
from shardspec.rules.parse import parse_table
from shardspec.testing.bruteforce import Verdict, verify_operator
from tests.operators.cases import CASES
from tests.operators.trials import a_trial, fill, verdict_of

TRIALS = int(os.environ.get("SHARDSPEC_TRIALS", "22"))
MESH = ss.Mesh(dp=2, tp=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_rules_accept_of_direct_sums_is_what_the_ranks_compute(case):
    """Law: the same, where dims are direct sums, whose parts end anywhere."""
    trials = (a_trial(Random(f"sums {case.name} {seed}"), case, sums=0.8) for seed in range(TRIALS))
    summed = (trial for trial in trials if any(is_sum(dim) for layout in trial.layouts for dim in layout.dims))
    for trial in itertools.islice(summed, TRIALS // 11):
        verdict = verdict_of(case, trial)
        assert verdict.correct, f"{trial}\n{verdict.problem}"


@frozen
class Packed:
    """Operands with a dim of three parts, (H E + K E + K E), of which an operator knows the lengths."""

    name: str
    shapes: str
    """`b n, n`: n is the packed dim, h its first part, k its others, e the width of a head; o any other."""
    op: Callable[..., Any]
    outputs: str
    """The layouts of the results, for four heads and two, both of width two, on dp=2,tp=2."""


def cut(x: Tensor, n: Any) -> tuple[Tensor, ...]:
    return x.split([n.h, n.k, n.k], -1)


PACKED = [
    Packed("projection", "b o, n o, n", lambda x, w, bias, n: F.linear(x, w, bias), "[2@dp, (4@tp + 2@tp + 2@tp)]"),
    Packed(
        "projection, cut",
        "b o, n o, n",
        lambda x, w, bias, n: cut(F.linear(x, w, bias), n),
        "[2@dp, 4@tp], [2@dp, 2@tp], [2@dp, 2@tp]",
    ),
    Packed(
        "cut by slices",
        "b n",
        lambda x, n: (x[:, : n.h], x[:, n.h : n.h + n.k], x[:, -n.k :]),
        "[2@dp, 4@tp], [2@dp, 2@tp], [2@dp, 2@tp]",
    ),
    Packed("cut by narrow", "b n", lambda x, n: x.narrow(1, n.h, 2 * n.k), "[2@dp, 2.tp.2]"),
    Packed("cut in two", "b n", lambda x, n: x.split([n.h + n.k, n.k], 1), "[2@dp, (4@tp + 2@tp)], [2@dp, 2@tp]"),
    Packed(
        "cut into heads",
        "b n",
        lambda x, n: x.view(n.b, n.n // n.e, n.e).split([n.h // n.e, n.k // n.e, n.k // n.e], 1),
        "[2@dp, 2@tp, 2], [2@dp, 1@tp, 2], [2@dp, 1@tp, 2]",
    ),
    Packed(
        "into heads and back", "b n", lambda x, n: x.unflatten(1, (-1, n.e)).flatten(1), "[2@dp, (4@tp + 2@tp + 2@tp)]"
    ),
    Packed("joined", "b h, b k, b k", lambda q, k, v, n: torch.cat([q, k, v], 1), "[2@dp, (4@tp + 2@tp + 2@tp)]"),
    Packed(
        "joined and cut",
        "b h, b k",
        lambda q, k, n: torch.cat([q, k, k], 1).split([n.h, n.k, n.k], 1)[1],
        "[2@dp, 2@tp]",
    ),
    Packed("joined to itself", "b n, b h", lambda x, q, n: torch.cat([x, q], 1), "[2@dp, (4@tp + 2@tp + 2@tp + 4@tp)]"),
    Packed("row-parallel", "b n, o n", lambda x, w, n: F.linear(x, w), "[2@dp, 6] +tp"),
    Packed("pointwise", "b n, n", lambda x, y, n: F.silu(x) * y + x, "[2@dp, (4@tp + 2@tp + 2@tp)]"),
    Packed("sum", "b n", lambda x, n: x.sum(1), "[2@dp] +tp"),
    Packed("mean", "b n", lambda x, n: x.mean(1), "[2@dp] +tp:avg"),
    Packed("largest", "b n", lambda x, n: x.amax(1), "[2@dp] +tp:max"),
    Packed("transposed", "b n", lambda x, n: x.t().contiguous(), "[(4@tp + 2@tp + 2@tp), 2@dp]"),
    Packed("repeated", "b n", lambda x, n: x.repeat(1, 2), "[2@dp, (4@tp + 2@tp + 2@tp + 4@tp + 2@tp + 2@tp)]"),
    Packed(
        "zeros beside it", "b n", lambda x, n: x + torch.zeros(n.b, n.n, dtype=x.dtype), "[2@dp, (4@tp + 2@tp + 2@tp)]"
    ),
    Packed("stacked", "b n, b n", lambda x, y, n: torch.stack([x, y]), "[2, 2@dp, (4@tp + 2@tp + 2@tp)]"),
    Packed(
        "gate and up",
        "b o, n o, o h",
        lambda x, w, down, n: F.linear(F.silu(cut(F.linear(x, w), n)[0]), down),
        "[2@dp, 6] +tp",
    ),
]


def a_packed(packed: Packed, mesh: ss.Mesh, h: int, k: int, e: int, order: str = "hkk") -> Verdict:
    """A verdict on heads h and k of width e, the parts laid out as (H@tp E + K@tp E + K@tp E), or in another order."""
    n = types.SimpleNamespace(b=4, h=h * e, k=k * e, e=e, o=6, n=(h + 2 * k) * e)
    text = {"b": "B@dp", "h": "(H@tp E)", "k": "(K@tp E)", "o": "O"}
    text["n"] = f"({' + '.join(f'{part.upper()}@tp E' for part in order)})"
    operands = [operand.split() for operand in packed.shapes.split(",")]
    generator = torch.Generator().manual_seed(h + k)
    inputs = [fill([getattr(n, label) for label in operand], " ", n, generator) for operand in operands]
    shapes = {"B": n.b, "H": h, "K": k, "E": e, "O": n.o}
    layouts = fit([" ".join(text[label] for label in operand) for operand in operands], inputs, shapes, mesh)
    return verify_operator(lambda *tensors: packed.op(*tensors, n), inputs, layouts, mesh)


def fit(specs: Sequence[str], inputs: Sequence[Tensor], known: dict[str, int], mesh: ss.Mesh) -> list[Layout]:
    """The layouts of specs whose factors' sizes are known."""
    table, _ = parse_table(ss.Rules(params={}, activations={f"x{index}": spec for index, spec in enumerate(specs)}))
    found = []
    for entry, tensor in zip(table.activations, inputs, strict=True):
        layout, _, problem = layout_of(entry, "x", tuple(tensor.shape), known, mesh, storage=False)
        assert problem is None
        found.append(layout)
    return found


@pytest.mark.parametrize("packed", PACKED, ids=lambda packed: packed.name)
def test_packed_operands_are_cut_and_joined_part_by_part(packed):
    """The layouts of the results are written by hand; other sizes and meshes are brute-forced."""
    verdict = a_packed(packed, MESH, 4, 2, 2)
    assert verdict.accepted, verdict.refusal
    assert verdict.correct, verdict.problem
    assert ", ".join(map(str, verdict.outputs)) == packed.outputs
    for sizes, h, k, e in (
        ({"tp": 3}, 6, 3, 1),
        ({"dp": 2, "tp": 3}, 3, 9, 2),
        ({"tp": 4}, 8, 4, 3),
        ({"tp": 2}, 2, 2, 4),
    ):
        verdict = a_packed(packed, ss.Mesh(**sizes), h, k, e)
        assert verdict.accepted, verdict.refusal
        assert verdict.correct, verdict.problem


@pytest.mark.parametrize("name", ["projection, cut", "cut by slices", "cut by narrow"])
def test_a_packed_dim_cut_within_a_part_is_refused(name):
    """Cut as H K K, and laid out as K H K: a rank would take rows of two parts for one."""
    packed = next(packed for packed in PACKED if packed.name == name)
    verdict = a_packed(packed, MESH, 4, 2, 2, order="khk")
    assert not verdict.accepted
    assert verdict.refusal.startswith("SS304")


@pytest.mark.parametrize(
    ("op", "layouts_", "code"),
    [
        (lambda x: x.softmax(0), [(Sum((("tp", 4), ("tp", 2))),)], "SS304"),
        (lambda x: x.flip(0), [(Sum((("tp", 4), ("tp", 2))),)], "SS304"),
        (lambda x: x.view(2, 6), [(Sum((("tp", 4), ("tp", 2))),)], "SS301"),
        (lambda x: x.view(4, 3), [(Sum((("tp", 4), ("tp", 2))),)], "SS301"),
        (lambda x: x[1:], [(Sum((("tp", 4), ("tp", 2))),)], "SS304"),
        (lambda x: x.chunk(2), [(Sum((("tp", 4), ("tp", 2))),)], "SS304"),
        (lambda x, y: x + y, [(Sum((("tp", 4), ("tp", 2))),), (Sum((("tp", 2), ("tp", 4))),)], "SS302"),
        (lambda x, y: x + y, [(Sum((("tp", 4), ("tp", 2))),), ("tp", 6)], "SS302"),
        (lambda x, y: x @ y, [(Sum((("tp", 4), ("tp", 2))),), ("tp", 6)], "SS302"),
        (lambda x, y: torch.cat([x, y]), [(Sum((("tp", 4), ("tp", 2))),), (12,)], "SS304"),
        (lambda x, y: torch.cat([x, y]), [("tp", 6), ("dp", 6)], "SS304"),
    ],
)  # fmt: skip
def test_what_mixes_the_parts_of_a_direct_sum_is_refused(op, layouts_, code):
    inputs = [torch.randn(12, dtype=torch.float64) for _ in layouts_]
    verdict = verify_operator(op, inputs, [Layout((dim,)) for dim in layouts_], MESH)
    assert not verdict.accepted
    assert verdict.refusal.startswith(code)


def test_a_direct_sum_behind_another_dim_is_not_flattened():
    layout = Layout(((2,), (Sum((("tp", 4), ("tp", 2))),)))
    verdict = verify_operator(torch.flatten, [torch.randn(2, 12, dtype=torch.float64)], [layout], MESH)
    assert verdict.refusal.startswith("SS301: the view of 2 x 12 as 24 cuts through a direct sum over tp=2")
