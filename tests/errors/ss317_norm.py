"""A norm that feeds a column-parallel product in one call and the residual in the other."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import NormUsedTwice


def trigger():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.(attention|feed_forward):in|output:in"],
        activations={r"layers\.\d+\.(attention_norm|feed_forward:in)|output:in": "B@(dp,fsdp) S@cp D"},
    )
    Case(model=with_parts(block=NormUsedTwice), rules=rules).compile()
