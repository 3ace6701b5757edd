"""A pattern of layers without the group that says which index it is."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    Case(mesh="pp=2", rules=RULES.override(pipeline=r"layers\.\d+")).compile()
