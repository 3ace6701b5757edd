"""An attribute by the name that another library gives it."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    Case(rules=RULES.override(attributes={r"layers\.\d+\.attention": {"num_heads": "H@tp"}})).compile()
