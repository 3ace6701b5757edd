"""A batch entry declared pending."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(activations={r"tokens|labels": "B@(dp,fsdp) S@cp +tp"})
    Case(rules=rules).compile()
