"""Replicas that split a parameter."""

from models.llama.rules import RULES
from tests.gallery.case import Case


def trigger():
    rules = RULES.override(params={r"output\.weight": "V@(tp,dp) D"})
    Case(rules=rules, mesh="dp=2,tp=2").compile()
