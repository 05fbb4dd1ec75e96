"""Who may ask. With keys: whoever shows one. Without: only this machine, and only as itself.

A browser will send a page's request to 127.0.0.1 for anyone who serves that page. So without keys a request must name a
local host (else a foreign name that resolves to this machine would do: DNS rebinding), must not come from a foreign
origin, and must say `application/json`, which a page cannot send across origins without asking, and we never say yes.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from asmodel.errors import AsmodelError, Forbidden


class Unauthorized(AsmodelError):
    status = 401
    type = "invalid_request_error"
    code: str | None = "invalid_api_key"
    retry = False


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request it is. `scope` parts the cache; `name` may stand in logs and traces."""

    name: str = ""
    scope: str = ""


class Access:
    """Lets a request in, or raises Unauthorized or Forbidden. `keys` by the name of whoever holds them."""

    def __init__(self, keys: Mapping[str, str], *, tracers: Collection[str] = ()) -> None:
        self._tracers = frozenset(tracers)
        # Digests have one length, so that a comparison says nothing about a key, its length included.
        self._keys = [(hashlib.sha256(key.encode()).digest(), name) for name, key in keys.items()]

    @property
    def open(self) -> bool:
        return not self._keys

    def may_force(self, headers: Mapping[str, str]) -> bool:
        """Whether the request asks to be traced whatever the sampler says, and is from one who may."""
        if headers.get("x-asmodel-trace", "").strip().lower() not in ("on", "1", "true"):
            return False
        try:
            caller = self.admit(headers)
        except AsmodelError:
            return False
        return not self._keys or caller.name in self._tracers

    def admit(self, headers: Mapping[str, str]) -> Caller:
        if not self._keys:
            _local(headers)
            return Caller()
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # A header's bytes came as Latin-1; what a client sent in them is the key in UTF-8.
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        found = None
        for key, name in self._keys:
            if hmac.compare_digest(key, digest):
                found = name
        if found is None or scheme.lower() != "bearer":
            raise Unauthorized("this server wants one of its keys, as `Authorization: Bearer KEY` (api_key in SDKs)")
        return Caller(found, found)


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _local(headers: Mapping[str, str]) -> None:
    if not _is_local(f"//{headers.get('host', '')}"):
        raise Forbidden(
            "without keys this server answers only under a local name (localhost, 127.0.0.1); "
            "to serve others, set [keys] and bind another address"
        )
    origin = headers.get("origin")
    if origin is not None and not _is_local(origin):
        raise Forbidden("without keys this server does not answer pages of other origins")


def _is_local(address: str) -> bool:
    # What is longer is none, and is not to be remembered.
    return len(address) < 300 and _known_local(address)


@functools.lru_cache(maxsize=64)
def _known_local(address: str) -> bool:
    return is_loopback(_hostname(address))


def _hostname(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
