"""One block of each kind stands for the others: what the check says must not hang on that."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shardspec as ss
from models.llama import PRESETS, RULES, WITHOUT_SP, build
from shardspec import compiler
from shardspec.kin import Kin, kindred, spells_digits
from shardspec.survey import survey
from tests.gallery.right import VARIANTS
from tests.gallery.wrong import FAULTS

LAYERS = 12
"""Indices of one digit and of two."""


@contextmanager
def every_block_for_itself() -> Iterator[None]:
    """Compile as if no two blocks were alike."""
    with mock.patch.object(compiler, "kindred", return_value=Kin()):
        yield


def small_llama(**changes: object) -> nn.Module:
    config = evolve(PRESETS["debug"], dim=16, n_heads=4, n_kv_heads=2, ffn_dim=32, vocab_size=32, n_layers=LAYERS)
    with torch.device("meta"):
        return build(evolve(config, max_seq_len=16, **changes))


def said(compile: Callable[[], ss.Plan]) -> str:
    """The plan, or what is wrong."""
    try:
        return compile().to_json()
    except ss.ShardingError as error:
        return str(error)


def tokens() -> dict[str, torch.Tensor]:
    return {name: torch.empty(8, 8, dtype=torch.long, device="meta") for name in ("tokens", "labels")}


def both(model: Callable[[], nn.Module], rules: ss.Rules, mesh: ss.Mesh) -> str:
    """What the check says, after comparing with the check of every block."""
    folded = said(lambda: ss.compile(model(), rules, mesh, tokens()))
    with every_block_for_itself():
        unfolded = said(lambda: ss.compile(model(), rules, mesh, tokens()))
    assert folded == unfolded
    return folded


MESH = ss.Mesh(fsdp=2, tp=2)


@pytest.mark.parametrize("fault", FAULTS[::4], ids=str)
def test_a_wrong_table_gets_the_same_message(fault):
    folded = said(lambda: fault.make().compile())
    with every_block_for_itself():
        assert said(lambda: fault.make().compile()) == folded


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_right_table_gets_the_same_plan(variant):
    folded = said(lambda: variant.make().compile())
    with every_block_for_itself():
        assert said(lambda: variant.make().compile()) == folded


TABLES = {
    "plain": (RULES, "{"),
    "without SP": (WITHOUT_SP, "{"),
    "a rule that spells an index out": (
        RULES.override(
            drop=[r"layers\.\d+\.attention\.wq\.weight"],
            params={
                r"layers\.(?!7\.)\d+\.attention\.wq\.weight": "(H@tp hd)@fsdp D",
                r"layers\.7\.attention\.wq\.weight": "(H@tp hd) D",
            },
        ),
        "{",
    ),
    "a rule for indices of two digits": (
        RULES.override(
            drop=[r"layers\.\d+\.feed_forward\.w2\.weight"],
            params={
                r"layers\.\d\.feed_forward\.w2\.weight": "D@fsdp F@tp",
                r"layers\.\d{2}\.feed_forward\.w2\.weight": "D F@tp",
            },
        ),
        "{",
    ),
    "one layer that no rule claims": (
        RULES.override(
            drop=[r"layers\.\d+\.feed_forward\.w2\.weight"],
            params={r"layers\.(\d|10)\.feed_forward\.w2\.weight": "D@fsdp F@tp"},
        ),
        "layers.11.feed_forward.w2.weight",
    ),
    "two rules for one layer": (
        RULES.override(params={r"layers\.1[0-9]\.feed_forward\.w2\.weight": "D@fsdp F@tp"}),
        "SS204",
    ),
    "a split layer that its partner is not": (
        RULES.override(
            drop=[r"layers\.\d+\.feed_forward\.w2\.weight"],
            params={
                r"layers\.(?!9\.)\d+\.feed_forward\.w2\.weight": "D@fsdp F@tp",
                r"layers\.9\.feed_forward\.w2\.weight": "D@fsdp F",
            },
        ),
        "layers.9",
    ),
    "a point of one layer": (
        RULES.override(
            drop=[r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?"],
            activations={
                r"tok_embeddings|layers\.\d+(\.attention)?|layers\.(?!10\.)\d+\.feed_forward": "B@(dp,fsdp) S@(cp,tp) D"
            },
        ),
        "layers.10.feed_forward",
    ),
    "units by index": (
        RULES.override(units=[r"layers\.\d", (r"layers\.1\d", "norm", "output"), "tok_embeddings"]),
        "{",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_tells_layers_apart_is_checked_in_every_layer(name):
    rules, says = TABLES[name]
    assert says in both(small_llama, rules, MESH)


def test_a_tie_between_layers_is_kept():
    def tied() -> nn.Module:
        model = small_llama()
        model.layers[11].feed_forward.w1.weight = model.layers[3].feed_forward.w1.weight
        return model

    text = both(tied, RULES, MESH)
    assert '"first": "layers.3.feed_forward.w1.weight"' in text
    names = survey(tied())
    assert {"layers.3", "layers.11"}.isdisjoint(names.blocks)
    assert names.tangled


def test_a_layer_that_is_used_twice_goes_by_its_first_name():
    def shared() -> nn.Module:
        model = small_llama()
        model.layers[10] = model.layers[2]
        return model

    assert '"layers.10"' not in both(shared, RULES, MESH)


def test_a_layer_with_another_attribute_is_another_layer():
    def odd() -> nn.Module:
        model = small_llama()
        model.layers[5].attention.n_heads = 2
        return model

    assert "layers.5" in both(odd, RULES, MESH)


@pytest.mark.parametrize(("heads", "says"), [(8, "{"), (5, "n_heads=5 cannot be split")])
def test_an_attribute_that_is_another_in_one_layer_is_looked_at_there(heads, says):
    class Layer(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.n_heads = heads
            self.wq = nn.Linear(40, 40, bias=False)
            self.wo = nn.Linear(40, 40, bias=False)

        def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
            q_BSHd = self.wq(x_BSD).view(*x_BSD.shape[:2], self.n_heads, -1)
            return x_BSD + self.wo(q_BSHd.softmax(-1).flatten(2))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(heads if index == 7 else 4) for index in range(LAYERS))

        def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x_BSD = layer(x_BSD)
            return x_BSD

    rules = ss.Rules(
        params={r"layers\.\d+\.wq\.weight": "E@tp D", r"layers\.\d+\.wo\.weight": "D E@tp"},
        activations={"x_BSD": "B@dp S D", r"layers\.\d+\.(wq:in|wo)": "B@dp S D"},
        attributes={r"layers\.\d+": {"n_heads": "H@tp"}},
    )
    inputs = {"x_BSD": torch.empty(4, 3, 40, device="meta")}

    def compiled() -> str:
        return said(lambda: ss.compile(Stack, rules, ss.Mesh(dp=2, tp=2), inputs))

    folded = compiled()
    with every_block_for_itself():
        assert compiled() == folded
    assert says in folded


def test_a_layer_with_a_hook_is_another_layer():
    def hooked() -> nn.Module:
        model = small_llama()
        model.layers[4].feed_forward.register_forward_hook(lambda module, args, out: out.sum(-1, keepdim=True) + out)
        return model

    assert "layers.4" in both(hooked, RULES, MESH)


def test_a_frozen_layer_is_another_layer():
    def frozen() -> nn.Module:
        model = small_llama()
        model.layers[6].requires_grad_(False)
        return model

    text = both(frozen, RULES, MESH)
    assert text.count('"trained": false') == 9 + 2, "nine parameters, two buffers"


@pytest.mark.parametrize("count", [2, LAYERS])
def test_as_many_blocks_are_looked_at_as_there_are_kinds(count):
    names = survey(small_llama(n_layers=count))
    heads = kindred(names, [], []).heads
    assert set(heads.values()) == {"layers.0", "layers.10"} & {f"layers.{index}" for index in range(count)}
    assert len(names.outline(heads).parameters) < len(names.whole.parameters) or count == 2


PIECES = st.sampled_from(
    [r"\d", r"\d+", r"\w", ".", "[0-9]", "[^.]+", r"\.", "w", "a", "(?:a|w)", r"\d{2}", r"\D", "[a-z]"]
)


@given(st.lists(PIECES, min_size=1, max_size=6).map("".join), st.text("aw.", max_size=4), st.integers(1, 3), st.data())
def test_a_pattern_that_spells_no_digit_takes_every_index_of_a_length_alike(pattern, suffix, length, data):
    """One match tells for all indices of as many digits."""
    assert not spells_digits(pattern, ["w.0"])
    indices = st.text("0123456789", min_size=length, max_size=length)
    names = [f"w.{data.draw(indices)}{suffix}" for _ in range(3)]
    assert len({re.fullmatch(pattern, name) is not None for name in names}) == 1


@pytest.mark.parametrize(
    ("pattern", "container", "spells"),
    [
        (r"layers\.\d+\.w[13]", "layers", False),
        (r"layers\.\d+\.w[13]|layers\.7", "layers", True),
        (r"layers\.[0-9]+\.w", "layers", False),
        (r"layers\.[1-9]+\.w", "layers", True),
        (r"layers\.7\.w", "layers", True),
        (r"layers\.(?P<i>\d+)\.experts\.(?P=i)", "layers", True),
        (r"(\d+)\.\1", "layers", True),
        (r"layer\d+\.1\.conv", "layer2", True),
        (r"layers\.[a{1}]\d", "layers", True),
        (r"layers\.\d{1,3}\.w", "layers", False),
        (r"layers\.\x31\.w", "layers", True),
    ],
)
def test_what_a_pattern_may_tell_apart(pattern, container, spells):
    assert spells_digits(pattern, [f"{container}.0"]) is spells


def test_the_table_of_llama_tells_no_blocks_apart():
    assert not any(spells_digits(rule.pattern, ["layers.0"]) for rule in RULES.rules)
