"""An argument that this version does not run."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(experts=r"layers\.\d+\.feed_forward")
    Case(rules=rules).compile()
