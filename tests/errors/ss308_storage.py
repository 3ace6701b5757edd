"""Storage over an axis on which the gradient is complete."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(
        drop=[r"positions"],
        params={r"output\.weight": "V@(tp,cp) D"},
        activations={
            r"tokens|labels": "B@(dp,fsdp) S",
            r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": "B@(dp,fsdp) S@tp D",
            r"layers\.\d+\.(attention|feed_forward):in|output:in": "B@(dp,fsdp) S D",
            r"output": "B@(dp,fsdp) S V@tp",
        },
    )
    Case(rules=rules, mesh="cp=2,tp=2").compile()
