"""Names that differ in an index alone are told of together."""

import re

import pytest

from shardspec.names import block_of, fold
from shardspec.rules.match import as_pattern


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("layers.0.attention.wq.weight", "layers.*.attention.wq.weight"),
        ("layers.12", "layers.*"),
        ("layers.0:in", "layers.*:in"),
        ("layers.0:in.mask", "layers.*:in.mask"),
        ("layers.3.moe.experts.11.w1", "layers.*.moe.experts.*.w1"),
        ("0.weight", "*.weight"),
        ("7", "*"),
        ("conv2d.1x1.weight", "conv2d.1x1.weight"),
        ("tokens", "tokens"),
        ("", ""),
    ],
)
def test_an_index_is_folded_and_a_digit_in_a_word_is_not(name, folded):
    assert fold(name) == folded
    assert re.fullmatch(as_pattern(folded), name)


@pytest.mark.parametrize(
    ("folded", "block"),
    [
        ("layers.*.attention.wq.weight", ("layers.*", "attention.wq.weight")),
        ("layers.*.moe.experts.*.w1", ("layers.*", "moe.experts.*.w1")),
        ("layers.*", ("layers.*", "")),
        ("layers.*:in", ("layers.*", ":in")),
        ("layers.*.attention:in.mask", ("layers.*", "attention:in.mask")),
        ("norm.weight", ("", "norm.weight")),
        ("output:out.*", ("", "output:out.*")),
    ],
)
def test_a_block_is_what_comes_before_the_first_index_and_it(folded, block):
    assert block_of(folded) == block
