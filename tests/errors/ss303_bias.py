"""A bias behind a row-parallel product, counted once a rank."""

from models.llama.rules import RULES
from tests.gallery.case import Case, with_parts
from tests.gallery.parts import BiasAfterTheHeads


def trigger():
    rules = RULES.override(params={r"layers\.\d+\.attention\.bias": "D@fsdp"})
    Case(model=with_parts(attention=BiasAfterTheHeads), rules=rules).compile()
