"""Tied weights that are laid out differently."""

from models.llama.rules import RULES
from tests.gallery.case import Case, llama


def trigger():
    rules = RULES.override(params={r"output\.weight": "V D@fsdp"})
    Case(rules=rules, model=llama(tied=True)).compile()
