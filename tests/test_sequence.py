"""A sequence over cp: who computes which scores, which positions a rank holds, and blocks that merge to the whole."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import shardspec as ss
from shardspec.layout import Layout
from shardspec.moves import NoTransition, transition
from shardspec.placement import digits_index
from shardspec.runtime.kernels import attend, attend_backward
from shardspec.sequence import chunks_of, grid, work

RANKS = (2, 3, 4, 8)


@pytest.fixture(autouse=True)
def _in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def causal_pairs(chunks: int) -> set[tuple[int, int]]:
    """(query, key) of a causal mask, where each chunk is of two positions."""
    return {(row, column) for row in range(2 * chunks) for column in range(row + 1)}


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("balanced", [False, True])
def test_the_blocks_of_all_ranks_are_the_causal_mask_each_score_once(ranks: int, balanced: bool):
    """By the ring's sources as by gathered keys."""
    chunks = 2 * ranks if balanced else ranks
    for sources in ([chunks_of(rank, ranks, balanced=balanced) for rank in range(ranks)], [tuple(range(chunks))]):
        seen: list[tuple[int, int]] = []
        for rank, columns in itertools.product(range(ranks), sources):
            rows = chunks_of(rank, ranks, balanced=balanced)
            for block in grid(rows, columns, causal=True).blocks:
                at = [2 * chunk + i for chunk in rows[slice(*block.rows)] for i in range(2)]
                of = [2 * chunk + i for chunk in columns[slice(*block.columns)] for i in range(2)]
                for (i, row), (j, column) in itertools.product(enumerate(at), enumerate(of)):
                    if not block.causal or j <= i:
                        seen.append((row, column))
        assert len(seen) == len(set(seen))
        assert set(seen) == causal_pairs(chunks)


@pytest.mark.parametrize("ranks", RANKS)
def test_head_and_tail_give_every_rank_the_same_work_and_order_gives_the_last_the_most(ranks: int):
    even = [work(rank, ranks, causal=True, balanced=True) for rank in range(ranks)]
    assert even == pytest.approx([0.5 / ranks] * ranks)
    uneven = [work(rank, ranks, causal=True, balanced=False) for rank in range(ranks)]
    assert uneven == pytest.approx([(rank + 0.5) / ranks**2 for rank in range(ranks)])


def test_two_ranks_hold_the_outer_and_the_inner_chunks():
    mesh = ss.Mesh(cp=2)
    held = [digits_index(("cp", 4), {"cp": rank}, mesh, balanced=True).tolist() for rank in range(2)]
    assert held == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize(
    "digits", [("cp", 4), (3, "cp", 4), ("cp", "tp", 3), ("dp", "cp", 2), ("cp", 2, "tp", 1), ("cp", "tp", 2, "dp")]
)
def test_the_ranks_hold_every_index_once_and_outer_digits_stay_where_they_are(digits):
    mesh = ss.Mesh(dp=2, cp=3, tp=2)
    digits = tuple(digit for digit in digits if digit != 1)
    axes = [digit for digit in digits if isinstance(digit, str)]
    found: list[int] = []
    for place in mesh.coordinates():
        if all(place[axis] == 0 for axis in mesh.axes if axis not in axes):
            found += digits_index(digits, place, mesh, balanced=True).tolist()
    assert sorted(found) == list(range(len(found)))


def test_a_balanced_axis_does_not_move_within_another():
    """cp outside of tp: tp is gathered first, and cp alone cannot be."""
    sizes = {"cp": 2, "tp": 2}
    both, whole, inner = Layout((("cp", "tp", 3),)), Layout(((12,),)), Layout((("tp", 6),))
    assert [move.axis for move in transition(both, whole, sizes, ("cp",))] == ["tp", "cp"]
    assert [move.axis for move in transition(whole, both, sizes, ("cp",))] == ["cp", "tp"]
    assert [(move.kind, move.axis) for move in transition(both, inner, sizes, ("cp",))] == [
        ("all_gather", "tp"),
        ("all_gather", "cp"),
        ("slice", "tp"),
    ]
    with pytest.raises(NoTransition, match="head and tail"):
        transition(Layout((("cp", 3),)), Layout(((6,),)), sizes, ("cp",))


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention by its definition, with the log-sum-exp of each row."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


KERNELS = list(itertools.product((1, 2, 4), (4, 6), (True, False)))


@pytest.mark.parametrize(("kv", "width", "causal"), KERNELS)
def test_a_kernel_is_attention_by_its_definition_with_the_gradients_of_its_definition(kv, width, causal):
    """Values as wide as keys run by torch's kernel, others by products."""
    keys = 7 if causal else 5
    generator = torch.Generator().manual_seed(kv + width)
    q = torch.randn(2, 4, 7, 4, generator=generator, requires_grad=True)
    k = torch.randn(2, kv, keys, 4, generator=generator, requires_grad=True)
    v = torch.randn(2, kv, keys, width, generator=generator, requires_grad=True)
    wanted, lse = plain(q, k, v, causal=causal, scale=0.3)
    out, own = attend(q.detach(), k.detach(), v.detach(), causal=causal, scale=0.3)
    assert torch.allclose(out, wanted, atol=1e-13)
    assert torch.allclose(own, lse, atol=1e-13)
    grad = torch.randn(out.shape, generator=generator)
    found = attend_backward(grad, q.detach(), k.detach(), v.detach(), out, own, causal=causal, scale=0.3)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_the_gradients_of_blocks_add_up_to_those_of_the_whole():
    """Each block is given the output and log-sum-exp of all keys."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 2, 6, 4, generator=generator, requires_grad=True) for _ in range(3))
    wanted = F.scaled_dot_product_attention(q, k, v, scale=0.5)
    grad = torch.randn(wanted.shape, generator=generator)
    out, lse = plain(q, k, v, causal=False, scale=0.5)
    halves = [
        attend_backward(
            grad, *(t.detach() for t in (q, k[:, :, part], v[:, :, part], out, lse)), causal=False, scale=0.5
        )
        for part in (slice(0, 2), slice(2, 6))
    ]
    own = (torch.cat(parts, 2) for parts in zip(halves[0][1:], halves[1][1:], strict=True))
    found = (halves[0][0] + halves[1][0], *own)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, (q, k, v), grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
