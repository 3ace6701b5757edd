"""A pattern that is no regex."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.(\d+\.attention\.wo\.bias": "D"})
    Case(rules=rules).compile()
