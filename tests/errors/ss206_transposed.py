"""A weight whose dims are exchanged."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.feed_forward\.w2\.weight": "F@tp D@fsdp"})
    Case(rules=rules).compile()
