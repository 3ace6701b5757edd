"""A tied weight used inside and outside sequence parallelism."""

from models.llama.rules import RULES
from tests.gallery.case import Case, llama


def trigger():
    rules = RULES.override(
        drop=[r"layers\.\d+\.(attention|feed_forward):in|output:in"],
        params={r"tok_embeddings\.weight": "V@fsdp D", r"output\.weight": "V@fsdp D"},
        activations={
            r"layers\.\d+\.(attention|feed_forward):in": "B@(dp,fsdp) S@cp D",
            r"output": "B@(dp,fsdp) S@(cp,tp) V",
        },
    )
    Case(model=llama(tied=True), rules=rules, loss=None).compile()
