"""Norms that no rule claims."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(drop=[r"(layers\.\d+\.\w+_norm|norm)\.weight"])
    Case(rules=rules).compile()
