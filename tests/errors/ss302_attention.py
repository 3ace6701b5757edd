"""Keys that are whole beside queries that are split."""

from models.llama.rules import WITHOUT_SP
from tests.gallery.case import Case


def trigger():
    rules = WITHOUT_SP.override(params={r"layers\.\d+\.attention\.w[kv]\.weight": "(K hd)@fsdp D"})
    Case(rules=rules).compile()
