"""A size told for a factor that no rule has."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    Case(rules=RULES.override(sizes={"hdd": 16})).compile()
