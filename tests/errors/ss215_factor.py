"""A factor whose size nothing tells."""

from models.llama.rules import RULES
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import HalvesOfOneProduct


def trigger():
    rules = RULES.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"layers\.\d+\.feed_forward\.w13\.weight": "(parts G@tp)@fsdp D"},
    )
    Case(model=with_parts(feed_forward=HalvesOfOneProduct), rules=rules).compile()
