"""Only half of a feed-forward is split."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(params={r"layers\.\d+\.feed_forward\.w2\.weight": "D@fsdp F"})
    Case(rules=rules).compile()
