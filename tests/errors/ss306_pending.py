"""A complete value declared pending."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(activations={r"layers\.\d+\.attention_norm": "B@(dp,fsdp) S@cp D +tp"})
    Case(rules=rules).compile()
