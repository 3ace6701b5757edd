"""The rule of a batch entry among those of parameters."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(drop=[r"tokens|labels"], params={r"tokens|labels": "B@fsdp S"})
    Case(rules=rules).compile()
