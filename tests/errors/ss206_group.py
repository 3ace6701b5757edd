"""Factors that do not make up their dim."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@fsdp (K@tp hd)"})
    Case(rules=rules).compile()
