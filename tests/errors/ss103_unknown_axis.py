"""An axis that does not exist."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"output\.weight": "V@tpp D"})
    Case(rules=rules).compile()
