"""Stages are cut where the costliest costs least, by what each layer of the recorded program costs."""

from itertools import combinations, pairwise
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import shardspec as ss
from models.llama.model import LlamaConfig
from models.llama.presets import build
from shardspec.balance import LayerCosts, balance, layer_costs
from shardspec.compiler import Compiler
from shardspec.survey import survey

LAYERS = r"layers\.(?P<pp>\d+)"


def cuts(layers: int, stages: int) -> list[tuple[int, ...]]:
    """Every way to cut layers into stages of at least one."""
    inner = combinations(range(1, layers), stages - 1)
    return [tuple(b - a for a, b in pairwise((0, *bounds, layers))) for bounds in inner]


def loads(costs: list[int], cut: tuple[int, ...], first: int, last: int) -> list[int]:
    """What each stage of a cut costs."""
    found: list[int] = []
    rest = list(costs)
    for count in cut:
        found.append(sum(rest[:count]))
        rest = rest[count:]
    found[0] += first
    found[-1] += last
    return found


@given(st.lists(st.integers(0, 6), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12))
@example([1, 1, 1, 1, 1, 1], 4, 0, 0)
@example([0, 0, 0, 0], 2, 0, 0)
@example([1, 1, 1], 1, 5, 7)
def test_no_cut_has_a_cheaper_costliest_stage_nor_is_as_cheap_and_more_even(costs, stages, first, last):
    """Over all cuts: the least maximum, then the least squares of costs, of counts, then long stages last."""
    if stages > len(costs):
        with pytest.raises(ValueError, match=f"{len(costs)} layers cannot be cut into {stages} stages"):
            balance(costs, stages, first, last)
        return

    def rank(cut: tuple[int, ...]) -> tuple[object, ...]:
        found = loads(costs, cut, first, last)
        return max(found), sum(load**2 for load in found), sum(count**2 for count in cut), cut

    assert balance(costs, stages, first, last) == min(cuts(len(costs), stages), key=rank)


@given(st.lists(st.floats(0, 1e12), min_size=2, max_size=8), st.integers(1, 4), st.floats(1e-6, 1e6))
def test_fractions_are_compared_exactly(costs, stages, scale):
    """What balances numbers balances them in any unit that is a power of two."""
    stages = min(stages, len(costs))
    assert balance(costs, stages) == balance([cost * 2.0**-9 for cost in costs], stages)
    assert sum(balance([cost * scale for cost in costs], stages)) == len(costs)


@pytest.mark.parametrize(
    ("costs", "stages", "first", "last", "expected"),
    [
        ([1] * 8, 4, 0, 0, (2, 2, 2, 2)),
        ([1] * 6, 4, 0, 0, (1, 1, 2, 2)),
        ([0.1] * 6, 3, 0, 0, (2, 2, 2)),
        ([1] * 8, 4, 0, 2, (2, 2, 3, 1)),
        ([1] * 8, 4, 2, 0, (1, 2, 2, 3)),
        ([1] * 126, 16, 0, 1, (7,) + (8,) * 14 + (7,)),
        ([5, 1, 1, 1], 2, 0, 0, (1, 3)),
    ],
)
def test_the_head_counts_and_ties_are_even_with_longer_stages_last(costs, stages, first, last, expected):
    assert balance(costs, stages, first, last) == expected


@pytest.mark.parametrize(
    ("costs", "stages", "message"),
    [
        ([1, 1], 3, "2 layers cannot be cut into 3 stages"),
        ([], 1, "0 layers"),
        ([1, 1], 0, "0 stages"),
        ([1, -1], 2, "one is -1"),
        ([1, float("inf")], 2, "one is inf"),
        ([1, float("nan")], 2, "one is nan"),
    ],
)
def test_what_cannot_be_cut_is_an_error(costs, stages, message):
    with pytest.raises(ValueError, match=message):
        balance(costs, stages)


# Costs


class Stack(nn.Module):
    """Products between an embedding and a head, with work of the model's own before, between and behind the layers."""

    def __init__(self, widths: list[int], dim: int = 4, vocabulary: int = 16, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)) for width in widths
        )
        self.head = nn.Linear(dim, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def costs_of(model: nn.Module, pattern: str = LAYERS, loss=None, **shapes: tuple[int, ...]) -> LayerCosts:
    """The costs in a model that is given batch entries of integers."""
    inputs = {name: torch.empty(shape, dtype=torch.long, device="meta") for name, shape in shapes.items()}
    compiler = Compiler(survey(model), ss.Rules(params={}))
    return layer_costs(compiler.program(inputs, loss, None), pattern)


@pytest.mark.parametrize("tied", [False, True])
def test_a_layer_costs_its_products_its_elements_and_its_parameters(tied):
    """4NDW for N tokens and the two products D x W of a layer, 2DW for its parameters, ND for the sum behind it."""
    size_D, size_V, size_N = 4, 16, 3 * 5
    found = costs_of(Stack([8, 8, 32], size_D, size_V, tied), tokens=(3, 5))
    alone = {width: (4 * size_N + 2) * size_D * width for width in (8, 32)}
    total = size_N * size_D  # of two activations
    assert found.layers == {0: alone[8] + total, 1: alone[8] + total, 2: alone[32]}
    assert found.costs == tuple(found.layers.values())
    assert found.first == total + size_V * size_D
    assert found.last == total + (2 * size_N + 1) * size_D * size_V


def test_the_loss_stands_behind_the_last_layer():
    shapes = {"tokens": (3, 5), "labels": (3, 5)}
    plain = costs_of(Stack([8, 8]), **shapes)
    loss = costs_of(Stack([8, 8]), loss=lambda logits, batch: ss.cross_entropy(logits, batch["labels"]), **shapes)
    assert (loss.layers, loss.first) == (plain.layers, plain.first)
    assert loss.last > plain.last


def test_layers_are_told_by_their_index_wherever_they_stand():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.towers = nn.ModuleList([Stack([8] * 11), Stack([8] * 2)])
            self.named = nn.ModuleDict({"block7": nn.Sequential(nn.Linear(16, 16, bias=False))})

        def forward(self, tokens):
            return self.named["block7"](self.towers[0](tokens) + self.towers[1](tokens))

    one = costs_of(Stack([8]), tokens=(3, 5))
    inner = costs_of(Deep(), r"towers\.0\.layers\.(?P<pp>\d+)", tokens=(3, 5))
    assert list(inner.layers) == list(range(11))
    assert inner.first == one.first
    assert inner.layers[10] == one.layers[0]
    outer = costs_of(Deep(), r"towers\.(?P<pp>\d+)", tokens=(3, 5))
    assert outer.first == 0
    assert outer.layers[0] == inner.first + sum(inner.costs) + one.last
    named = costs_of(Deep(), r"named\.block(?P<pp>\d)", tokens=(3, 5))
    assert named.layers == {7: (2 * 15 + 1) * 16 * 16}
    assert named.last == 0
    assert costs_of(Deep(), r"blocks\.(?P<pp>\d+)", tokens=(3, 5)).layers == {}


class Attending(nn.Module):
    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(queries, keys)])

    def forward(self, tokens):
        return self.layers[0](tokens[..., None].float())


class Attention(nn.Module):
    def __init__(self, queries: int, keys: int) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys

    def forward(self, x_BS1):
        x = x_BS1[:, None].expand(-1, -1, -1, 8)
        q, k = x.expand(-1, self.queries, -1, -1), x.expand(-1, self.keys, -1, -1)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=self.queries != self.keys)


@pytest.mark.parametrize("keys", [4, 2])
def test_attention_costs_two_products_of_its_queries_with_all_keys(keys):
    size_B, size_S, size_H, size_E = 2, 6, 4, 8
    found = costs_of(Attending(size_H, keys), tokens=(size_B, size_S))
    assert found.layers == {0: 2 * 2 * size_B * size_H * size_S * size_S * size_E}


class One(nn.Module):
    """One layer that computes one function of x [2, 6, 10] and its weight."""

    def __init__(self, function, *weight: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Applied(function, weight)])

    def forward(self, tokens):
        return self.layers[0](tokens.float())


class Applied(nn.Module):
    def __init__(self, function, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.empty(weight, device="meta"))

    def forward(self, x):
        return self.function(x, self.weight)


@pytest.mark.parametrize(
    ("function", "weight", "operations"),
    [
        (lambda x, w: F.conv1d(x, w, padding=2), (8, 6, 5), 2 * (2 * 8 * 10) * (6 * 5)),
        (lambda x, w: torch.einsum("bsd,dhe->bshe", x, w), (10, 3, 4), 2 * (2 * 6) * 10 * (3 * 4)),
        (lambda x, w: torch.einsum("bsd,bsd->b", x * w, x), (10,), 2 * 6 * 10 + 2 * (2 * 6 * 10)),
        (lambda x, w: F.linear(x, w), (7, 10), 2 * (2 * 6) * 10 * 7),
        (lambda x, w: x @ w, (10, 7), 2 * (2 * 6) * 10 * 7),
        (lambda x, w: x.reshape(12, 10) @ w, (10,), 2 * 12 * 10),
        (lambda x, w: (x * w).transpose(1, 2)[:, :3], (10,), 2 * 6 * 10),
        (lambda x, w: torch.baddbmm(w, x, x.transpose(1, 2)), (6, 6), 2 * 2 * 6 * 6 * 10),
    ],
)
def test_an_operator_costs_its_products_or_its_elements_and_a_view_nothing(function, weight, operations):
    assert costs_of(One(function, *weight), tokens=(2, 6, 10)).layers == {0: operations + prod(weight)}


def test_the_products_of_a_llama_are_those_that_torch_counts():
    """Torch counts products alone; what elements and parameters add is a small part of a wide model."""
    config = LlamaConfig(dim=256, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=1024, vocab_size=512, max_seq_len=64)
    with torch.device("meta"):
        model = build(config)
    found = costs_of(model, tokens=(32, 64))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        model(torch.empty(32, 64, dtype=torch.long))
    counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    assert len(set(found.costs[:-1])) == 1
    for index, cost in found.layers.items():
        exact = counts[f"Llama.layers.{index}"]
        assert exact < cost < 1.2 * exact
    assert counts["Llama.output"] < found.last < 1.2 * counts["Llama.output"]
    assert found.first < 0.1 * found.costs[0]


def test_a_deep_model_has_as_many_layers_as_it_runs():
    config = LlamaConfig(dim=64, n_layers=126, n_heads=4, n_kv_heads=2, ffn_dim=128, vocab_size=64, max_seq_len=16)
    with torch.device("meta"):
        model = build(config)
    found = costs_of(model, tokens=(4, 16))
    assert len(found.layers) == 126
    assert prod(balance(found.costs, 14, found.first, found.last)) == 9**14
