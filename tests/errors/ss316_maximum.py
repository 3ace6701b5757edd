"""A gradient through a maximum over ranks."""

from models.llama.rules import RULES
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import ScaledByItsMaximum


def trigger():
    rules = RULES.override(activations={r"top": "B@(dp,fsdp) S@cp 1"})
    Case(model=with_parts(model=ScaledByItsMaximum), rules=rules).compile()
