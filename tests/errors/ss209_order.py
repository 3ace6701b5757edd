"""Storage in front of compute."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"tok_embeddings\.weight": "V@(fsdp,tp) D"})
    Case(rules=rules).compile()
