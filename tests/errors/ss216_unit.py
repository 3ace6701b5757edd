"""A parameter that is read while its unit does not run."""

from models.llama.rules import RULES
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import HandWrittenNorm


def trigger():
    rules = RULES.override(units=[r"layers\.\d+\.attention_norm"])
    Case(model=with_parts(block=HandWrittenNorm), rules=rules).compile()
