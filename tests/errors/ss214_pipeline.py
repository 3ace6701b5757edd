"""Pipeline ranks, which no rule names and this version does not run: one message."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="pp=2").compile()
