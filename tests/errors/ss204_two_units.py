"""A module in two units."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(units=[r"layers\.\d+", r"layers\.0"])
    Case(rules=rules).compile()
