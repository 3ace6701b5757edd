"""Fewer key-value heads than tp."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="tp=8").compile()
