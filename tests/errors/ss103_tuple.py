"""A tuple, as JAX takes it, in place of `ss.P`."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"output\.weight": ("tp", None)})
    Case(rules=rules).compile()
