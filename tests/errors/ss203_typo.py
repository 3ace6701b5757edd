"""A typo in a pattern."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(
        drop=[r"layers\.\d+\.attention\.wo\.weight"],
        params={r"layers\.\d+\.attenton\.wo\.weight": "D@fsdp (H@tp hd)"},
    )
    Case(rules=rules).compile()
