"""A unit that no module matches."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(units=[r"layers\.\d+\.attn"])
    Case(rules=rules).compile()
