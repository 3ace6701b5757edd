"""The gather in front of attention is forgotten."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(
        drop=[r"layers\.\d+\.(attention|feed_forward):in|output:in"],
        activations={r"layers\.\d+\.feed_forward:in|output:in": "B@(dp,fsdp) S@cp D"},
    )
    Case(rules=rules).compile()
