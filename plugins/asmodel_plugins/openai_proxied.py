"""The client of openai_http.py for a server that is reached through the HTTP proxy that the environment names: aiohttp.

Imported only where there is such a proxy. What a call costs more here is little beside the way through the proxy.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote

import aiohttp
from aiohttp import hdrs

from asmodel_plugins.openai_http import Cut, NotInTime, Response, Unreached, checked


class ProxiedClient:
    """As HTTPClient, through `proxy`; where it is None, directly. `origin` is scheme, host and port."""

    def __init__(
        self,
        *,
        origin: str,
        headers: Mapping[str, str],
        connections: int,
        connect_timeout: float,
        proxy: SplitResult | None = None,
    ) -> None:
        defaults = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "asmodel"}
        self._headers = defaults | dict(checked(name, value) for name, value in headers.items())
        self._to_proxy = _password(proxy)
        if origin.startswith("http:"):
            # There is no tunnel, whose own request would carry it: the proxy is asked with the request itself.
            self._headers |= self._to_proxy
        self._origin = origin
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=connections, ttl_dns_cache=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout),
            # No headers: those of a session go to the proxy as well, and our key is none of its business.
            skip_auto_headers=[hdrs.CONTENT_TYPE],
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[_noting_reuse()],
            proxy=None if proxy is None else proxy._replace(netloc=proxy.netloc.rpartition("@")[2]).geturl(),
        )

    async def send(
        self, path: str, body: bytes, *, more: Mapping[str, str], whole: bool, resent: Callable[[], object]
    ) -> Response:
        url = self._origin + path
        headers = self._headers | dict(checked(name, value) for name, value in more.items())
        for left in (2, 1, 0):
            sending = _Sending()
            try:
                response = await self._session.post(
                    url,
                    data=body,
                    headers=headers,
                    allow_redirects=False,
                    # A copy, for aiohttp writes into it.
                    proxy_headers=dict(self._to_proxy),
                    trace_request_ctx=sending,
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, ConnectionError) as error:
                if not (left and sending.reused):
                    raise _unreached(error) from error
                resent()
            except (aiohttp.ClientError, OSError) as error:
                raise _unreached(error) from error
            else:
                return _Answer(response)
        raise AssertionError("the last round returns or raises")

    async def close(self) -> None:
        await self._session.close()


class _Answer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.content_type
        self.headers = {name.lower(): value for name, value in response.headers.items()}

    @property
    def ended(self) -> bool:
        return self._response.content.at_eof()

    def whole_body(self) -> bytes | None:
        return None

    async def block(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise Cut("the connection was closed") from error

    def release(self) -> None:
        # To the pool where all was read, else closed: the server sees us leave.
        self._response.release()


@dataclass(slots=True)
class _Sending:
    """One request on its way."""

    reused: bool = False
    """Whether it went out on a connection that had been used before."""


def _noting_reuse() -> aiohttp.TraceConfig:
    async def reused(_: aiohttp.ClientSession, context: Any, __: object) -> None:
        if isinstance(context.trace_request_ctx, _Sending):
            context.trace_request_ctx.reused = True

    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(reused)
    return trace


def _unreached(error: Exception) -> Unreached | NotInTime:
    if isinstance(error, TimeoutError):
        return NotInTime()
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Unreached("no such host", "the host's name")
    if isinstance(error, (aiohttp.ClientSSLError, aiohttp.ClientConnectorCertificateError)):
        return Unreached(f"TLS failed ({error})", "the certificate and the scheme")
    if isinstance(error, (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)):
        return Unreached("the proxy of the environment does not connect", "HTTPS_PROXY and NO_PROXY")
    if isinstance(error, aiohttp.ClientConnectorError):
        return Unreached(error.os_error.strerror or "not connected", "that the server is up and the port right")
    if isinstance(error, (aiohttp.ClientResponseError, aiohttp.ClientPayloadError)):
        return Unreached("it does not answer in HTTP", "that the address is an HTTP server's")
    return Unreached("the connection was closed before an answer", "that the server has not stopped")


def _password(proxy: SplitResult | None) -> dict[str, str]:
    if proxy is None or not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"proxy-authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
