"""The sum behind a row-parallel product is forgotten."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(
        drop=[r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?"],
        activations={r"tok_embeddings|layers\.\d+(\.feed_forward)?": "B@(dp,fsdp) S@cp D"},
    )
    Case(rules=rules).compile()
