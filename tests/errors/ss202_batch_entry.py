"""A batch entry that no rule claims."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(drop=[r"tokens|labels"], activations={r"tokens": "B@(dp,fsdp) S@cp"})
    Case(rules=rules).compile()
