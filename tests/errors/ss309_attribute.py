"""A head count in an attribute."""

from tests.gallery.case import Case, with_parts
from tests.gallery.parts import HeadCountInAttribute


def trigger():
    Case(model=with_parts(attention=HeadCountInAttribute)).compile()
