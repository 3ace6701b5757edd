"""One axis on both dims."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.wo\.weight": "D@tp (H@tp hd)"})
    Case(rules=rules).compile()
