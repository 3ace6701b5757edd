"""Halves of a product that is split as one."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import HalvesOfOneProduct


def trigger():
    rules = WITHOUT_SP.override(
        drop=[r"layers\.\d+\.feed_forward\.w[13]\.weight"],
        params={r"layers\.\d+\.feed_forward\.w13\.weight": "G@(tp,fsdp) D"},
    )
    Case(model=with_parts(feed_forward=HalvesOfOneProduct), rules=rules).compile()
