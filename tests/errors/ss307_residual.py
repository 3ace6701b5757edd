"""A column-parallel input without a point beside a residual."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.(attention|feed_forward):in|output:in"],
        activations={r"layers\.\d+\.feed_forward:in|output:in": "B@(dp,fsdp) S@cp D"},
    )
    Case(rules=rules).compile()
