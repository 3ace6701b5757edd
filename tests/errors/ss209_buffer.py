"""A buffer that is stored in parts."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"rope_(cos|sin)": "T@fsdp hd"})
    Case(rules=rules).compile()
