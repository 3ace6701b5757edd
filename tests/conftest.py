"""`make test` gives one answer for one commit: hypothesis draws the same examples each time, with no time limit on one."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
