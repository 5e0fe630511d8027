"""Names that come from files of others and become names of files here."""

from __future__ import annotations

import re

from klab.kernels.errors import UsageError

LONGEST = 120


def plain_name(name: str, where: str) -> str:
    """The name, when it names a file in its folder and nothing elsewhere; UsageError otherwise. `where` is the file that has it."""
    if not name or len(name) > LONGEST or name.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", name):
        raise UsageError(f"{where}: {name[:40]!r} is no name: it becomes the name of a file, so no slashes, and no dot at its start")
    return name
