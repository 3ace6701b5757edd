"""Rows that the data ranks do not divide."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="dp=3,tp=2").compile()
