"""A broad pattern over narrow ones."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.w.\.weight": "(H@tp hd)@fsdp D"})
    Case(rules=rules).compile()
