"""Rotary angles of the whole sequence beside a part of it."""

from tests.gallery.case import Case


def trigger():
    Case(mesh="cp=2").compile()
