"""A spec with too few dims."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@fsdp"})
    Case(rules=rules).compile()
