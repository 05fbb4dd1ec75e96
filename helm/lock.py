"""Print the part of requirements.lock that an image needs: what is installed and what that needs, with its hashes.

    python lock.py requirements.lock pyproject.toml [--with EXTRA]... [--without NAME]...
    python lock.py requirements.lock pyproject.toml --only GROUP

Who needs a package is what the lock file says itself (`# via`). Only Python's own library is used: this runs before
anything is installed.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any


def picked(
    lock: str, project: str, *, extras: Collection[str] = (), without: Collection[str] = (), group: str = ""
) -> str:
    """The blocks of `lock` that the project's dependencies and `extras` need, or what its `group` needs alone.

    `without` leaves out dependencies, and with them what nothing else needs. Raises ValueError for a name that is none.
    """
    blocks = {block.partition("==")[0]: block for block in re.split(r"\n(?=[a-z0-9])", lock)[1:]}
    needs: dict[str, set[str]] = {}
    for name, block in blocks.items():
        for needed_by in re.findall(r"^ +# +(?:via )?([a-z0-9-]+)$", block, re.MULTILINE):
            needs.setdefault(needed_by, set()).add(name)
    written: dict[str, Any] = tomllib.loads(project)
    table = written["project"]
    if group:
        named = [each for each in written["dependency-groups"][group] if isinstance(each, str)]
    else:
        named = [*table["dependencies"], *(each for extra in extras for each in table["optional-dependencies"][extra])]
    roots = {re.split(r"[^A-Za-z0-9._-]", each)[0].lower().replace("_", "-") for each in named}
    if unknown := (roots - blocks.keys()) | (set(without) - roots):
        raise ValueError(f"{', '.join(sorted(unknown))}: not in the lock file, or not among what asmodel names")
    kept: set[str] = set()
    to_follow = list(roots - set(without))
    while to_follow:
        name = to_follow.pop()
        if name not in kept:
            kept.add(name)
            to_follow += needs.get(name, ())
    return "\n".join(block.rstrip() for name, block in blocks.items() if name in kept) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lock", type=Path)
    parser.add_argument("project", type=Path)
    parser.add_argument("--with", action="append", default=[], dest="extras", metavar="EXTRA")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    parser.add_argument("--only", default="", dest="group", metavar="GROUP")
    given = parser.parse_args()
    lock, project = given.lock.read_text(encoding="utf-8"), given.project.read_text(encoding="utf-8")
    print(picked(lock, project, extras=given.extras, without=given.without, group=given.group), end="")


if __name__ == "__main__":
    main()
