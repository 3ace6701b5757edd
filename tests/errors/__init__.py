"""Golden diagnostics: a mistake in `<code>_<name>.py`, and what the check says of it in `<code>_<name>.err`."""
