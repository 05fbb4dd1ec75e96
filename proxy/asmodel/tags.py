"""The tag of a stored entry: which program and step it belongs to, and whose it is; so that it can be found again.

    PROGRAM/STEP              of a server without keys
    PROGRAM/STEP#DIGEST       of a scope, which is not named: a shared store need not say who its tenants are
    #KIND                     of the store itself, such as its secret; never an answer

No program's name holds a slash or a number sign.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

SECRET = "#secret"
JOURNAL = "#effects"
DELIVERIES = "#deliveries"


@dataclass(frozen=True, slots=True)
class Tag:
    """A tag, read. `scope` is `scope_digest` of it."""

    program: str
    step: str
    scope: str = ""

    def __str__(self) -> str:
        return f"{self.program}/{self.step}" + (f"#{self.scope}" if self.scope else "")


@lru_cache(maxsize=1024)
def tag(program: str, step: str, scope: str = "") -> str:
    return str(Tag(program, step, scope_digest(scope)))


def scope_digest(scope: str) -> str:
    """12 hex digits that stand for a scope; nothing for the empty one."""
    return hashlib.sha256(f"scope {scope}".encode()).hexdigest()[:12] if scope else ""


def read(text: str) -> Tag | None:
    """What the tag says; None for an entry of the store itself, or of somebody else."""
    if text.startswith("#") or "/" not in text:
        return None
    program, _, rest = text.partition("/")
    step, _, scope = rest.rpartition("#") if _has_scope(rest) else (rest, "", "")
    return Tag(program, step, scope)


def _has_scope(rest: str) -> bool:
    digest = rest.rpartition("#")[2]
    return "#" in rest and len(digest) == 12 and all(c in "0123456789abcdef" for c in digest)
