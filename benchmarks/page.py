"""Tables in a page that is otherwise written by hand."""

import re
from pathlib import Path


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: for a page without the two marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = page.read_text()
    new, count = re.subn(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: text, old, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} has no {begin.strip()} ... {end}")
    page.write_text(new)
