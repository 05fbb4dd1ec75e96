"""Where a Valkey or Redis store is, as one address, and redis-py's client for it.

redis-py reads `redis://`, `rediss://` and `unix://`. Clusters and sentinels it takes in code only, so the addresses
`redis+cluster://` and `redis+sentinel://` are ours.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from asmodel.errors import ConfigurationError

try:
    from redis import exceptions as errors
    from redis.asyncio import Redis, RedisCluster
    from redis.asyncio.cluster import ClusterNode
    from redis.asyncio.connection import ConnectionPool, SSLConnection, parse_url
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
    from redis.backoff import NoBackoff
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the redis cache needs redis-py: pip install 'asmodel[redis]'", name="redis") from error

__all__ = ["Address", "Client", "Pipeline", "errors"]

_FILES = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")

_EXAMPLE = "redis://HOST:PORT/DB"


class Pipeline(Protocol):
    def execute_command(self, *words: bytes | str | int) -> object: ...

    async def execute(self, raise_on_error: bool) -> list[Any]: ...


class Client(Protocol):
    """What we use of redis-py's two clients."""

    def execute_command(self, *words: bytes | str | int) -> Awaitable[Any]: ...

    def scan_iter(self, match: bytes, count: int) -> AsyncIterator[bytes]: ...

    def pipeline(self, transaction: bool) -> Pipeline: ...

    async def aclose(self) -> None: ...


class Address:
    """An address that was understood. Nothing that is told of it but its hosts: passwords may be anywhere in it."""

    def __init__(self, url: str) -> None:
        """Raises ConfigurationError for what is no address."""
        try:
            parts = urlsplit(url)
            login, _, hosts = parts.netloc.rpartition("@")
            self._hosts = [_host(text) for text in hosts.split(",")] if hosts else []
        except ValueError as error:
            raise ConfigurationError(f"[cache] url: this is no address; write {_EXAMPLE}") from error
        kind, _, self._nodes = parts.scheme.partition("+")
        kind = {"valkey": "redis", "valkeys": "rediss"}.get(kind, kind)
        if kind not in ("redis", "rediss", "unix") or self._nodes not in ("", "cluster", "sentinel"):
            known = "redis, rediss, valkey, valkeys and unix are, and each but unix with +cluster or +sentinel too"
            raise ConfigurationError(f'[cache] url: "{parts.scheme}" is no kind of address; {known}')
        if kind == "unix" and self._nodes:
            raise ConfigurationError("[cache] url: several nodes are reached by redis:// or rediss://, not by a socket")
        if self._nodes and not self._hosts:
            raise ConfigurationError(f"[cache] url: {parts.scheme}:// needs at least one HOST:PORT")
        if not self._nodes and len(self._hosts) > 1:
            raise ConfigurationError(
                f"[cache] url: {len(self._hosts)} hosts are a cluster or sentinels; write "
                f"{kind}+cluster://HOST:PORT,… or {kind}+sentinel://HOST:PORT,…/SERVICE"
            )
        path = parts.path
        if self._nodes == "sentinel":
            service, _, database = path.strip("/").partition("/")
            self._service, path = unquote(service), f"/{database}"
            if not service:
                raise ConfigurationError(f"[cache] url: say which service; {kind}+sentinel://HOST:PORT,…/SERVICE/DB")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self._sentinel_login = {
            name: query.pop(f"sentinel_{name}") for name in ("username", "password") if f"sentinel_{name}" in query
        }
        if self._sentinel_login and self._nodes != "sentinel":
            raise ConfigurationError("[cache] url: sentinel_… options are for redis+sentinel://")
        host = f"{_bracketed(self._hosts[0][0])}:{self._hosts[0][1]}" if self._hosts else ""
        plain = f"{kind}://{login}{'@' if login else ''}{host}{path}?{urlencode(query, quote_via=quote)}"
        try:
            self._options: dict[str, Any] = dict(parse_url(plain))
        except ValueError as error:  # which names the option, and not its value
            raise ConfigurationError(f"[cache] url: {error}") from None
        if self._nodes:
            self._tls = self._options.pop("connection_class", None) is SSLConnection
            self._options.pop("host", None)
            self._options.pop("port", None)
        names = ",".join(f"{_bracketed(name)}:{port}" for name, port in self._hosts)
        self.place = f"{parts.scheme}://{names}{parts.path}"
        self.client(1, 1.0)  # options that there are not are refused here, not in the first request

    def check_files(self) -> None:
        """Raises ConfigurationError for a certificate file that is not there: redis-py would call it unreachable."""
        for option in _FILES:
            file = self._options.get(option)
            if file is not None and not os.path.exists(file):
                raise ConfigurationError(f'[cache] url: {option}: there is no "{file}"')

    def client(self, connections: int, timeout: float) -> Client:
        """A client that has not connected yet; `timeout` seconds are for each connect, write and read."""
        base: dict[str, Any] = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "protocol": 2,  # which every version, fork and proxy speaks, with no greeting to wait for
            "max_connections": connections,
        }
        try:
            if self._nodes == "cluster":
                return self._cluster(base | self._options)
            # A pooled connection may have died since its last use, or lead to a server that was the primary once.
            options: dict[str, Any] = (
                base | {"retry": Retry(NoBackoff(), 1, (errors.ConnectionError, errors.ReadOnlyError))} | self._options
            )
            pool: Any = self._sentinels(options) if self._nodes == "sentinel" else ConnectionPool(**options)
            pool.make_connection()
        except (TypeError, ValueError, errors.RedisError, errors.RedisClusterException) as error:
            raise ConfigurationError(f"[cache] url: {_refused(error)}") from error
        client = Redis(connection_pool=pool)
        client.auto_close_connection_pool = True
        return cast("Client", client)

    def _cluster(self, options: dict[str, Any]) -> Client:
        nodes = [ClusterNode(host, port) for host, port in self._hosts]
        # Slots without a server are misses, and not the end of the others.
        base: dict[str, Any] = {"require_full_coverage": False, "ssl": self._tls, "retry": Retry(NoBackoff(), 2)}
        return cast("Client", _Cluster(startup_nodes=nodes, **(base | options)))

    def _sentinels(self, options: dict[str, Any]) -> SentinelConnectionPool:
        theirs = {k: v for k, v in options.items() if k.startswith(("socket_", "ssl_")) or k == "protocol"}
        theirs |= self._sentinel_login | {"ssl": self._tls, "retry": Retry(NoBackoff(), 0)}
        sentinel: Any = Sentinel(self._hosts, sentinel_kwargs=theirs)  # type: ignore[no-untyped-call]  # in redis-py
        pool: SentinelConnectionPool = _SentinelPool(self._service, sentinel, ssl=self._tls, **options)
        return pool


class _Cluster(RedisCluster):
    """Hangs up on every node, also while it does not know them well enough to ask."""

    __slots__ = ()

    async def aclose(self) -> None:
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


class _SentinelPool(SentinelConnectionPool):
    """Closes the sentinels with itself."""

    def __init__(self, service: str, sentinel: Any, **options: Any) -> None:
        super().__init__(service, sentinel, **options)  # type: ignore[no-untyped-call]  # in redis-py
        self._sentinel = sentinel

    async def aclose(self) -> None:
        await super().aclose()
        for client in self._sentinel.sentinels:
            await client.aclose()


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    return unquote(parts.hostname or "127.0.0.1"), parts.port or 6379


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _refused(error: Exception) -> str:
    """The name of the option, in redis-py's words; never its value, which may be a secret."""
    text = str(error)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text:
        return f"redis-py has no option {text.rpartition(' ')[2]} for this kind of address"
    return f"redis-py does not take this address: {text}"
