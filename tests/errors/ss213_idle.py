"""A batch that every data rank reads whole."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(
        activations={
            r"tokens|labels": "B@dp S@cp",
            r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": "B@dp S@(cp,tp) D",
            r"layers\.\d+\.(attention|feed_forward):in|output:in": "B@dp S@cp D",
            r"output": "B@dp S@cp V@tp",
        }
    )
    Case(rules=rules).compile()
