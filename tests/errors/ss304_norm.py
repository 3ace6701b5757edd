"""A norm over a split width."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(
        activations={r"tok_embeddings|layers\.\d+(\.attention|\.feed_forward)?": "B@(dp,fsdp) S@cp D@tp"}
    )
    Case(rules=rules).compile()
