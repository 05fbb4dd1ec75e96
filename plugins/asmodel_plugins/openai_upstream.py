"""Any server that speaks OpenAI's API, by its base URL, over one pool of connections.

The connections are those of openai_http.py; where the environment names a proxy for the address, of openai_proxied.py.
Streams are read by openai_stream.py.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import orjson

from asmodel import tracing
from asmodel.calls import Call, Capabilities, Chat, Completion, Embed, Emit, Reply, Score, Terms, TokenLogprob
from asmodel.dialect import (
    Assembly,
    Refusal,
    body_of,
    embedded_error,
    error_of,
    finite,
    first_choice,
    forwarded,
    logprobs_of,
    mapping,
    refusal_of,
    reply_of,
    scrubbed,
    told_of,
    unread,
    usage_of,
)
from asmodel.errors import (
    ConfigurationError,
    Unsupported,
    UpstreamBroken,
    UpstreamError,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from asmodel.likelihood import PROBE_TOKENS, Trial, continuation_of, echoed, generated_of, prompt_tokens, proven
from asmodel.protocols import Forwarded, Told
from asmodel.timeouts import Bounds
from asmodel_plugins.openai_http import Client, Cut, Encoded, HTTPClient, NotInTime, Response, Unreached, checked
from asmodel_plugins.openai_stream import Stream, Unreadable, as_chunks

if TYPE_CHECKING:
    from asmodel_plugins.openai_proxied import ProxiedClient

BODY_LIMIT = 64 * 1024 * 1024
"""Bytes of one answer; more is not one."""
STREAM_LIMIT = 512 * 1024 * 1024
"""Bytes of one stream, which is a hundred times its text, and more where each token comes with the likeliest others."""

_ROUTES = {"chat": "/chat/completions", "completion": "/completions", "embed": "/embeddings"}
_ALL = 1_000_000
"""More tokens than any vocabulary has."""
_SAYS_NO = frozenset({"upstream_broken", "upstream_model_not_found", "upstream_not_implemented"})
_CUT = "upstream_connection_lost"
_QUOTED = "/%?:@!$&'()*+,;=~[]"
"""What of a path and a query stays as it was written, beside letters, digits and `_.-`."""
_P = ParamSpec("_P")
_T = TypeVar("_T")
_FLAGS = frozenset(f.name for f in fields(Capabilities)) - {"context"}


class OpenAIUpstream:
    """A model at an OpenAI-compatible server.

    `base_url` is what the SDKs take, as `http://127.0.0.1:11434/v1`. `api_key` is sent as a bearer token, and nothing
    where it is None; `headers` are sent with each request and win over ours. `identity` is who answers, for the cache
    key; by default the address and the model. `connect_timeout` in seconds, name look-up and TLS included; how long an
    answer may take is for the layers around this. `context` in tokens. `can` corrects what the server can do
    (`{"tools": false}`); log-likelihood it may forbid but not assert: that is proven by trying, in `detect`.

    Raises ConfigurationError on a base URL that is none, or on an unknown name in `can`.
    """

    priced = False  # By the settings alone: no such server says what it costs.

    def __init__(
        self,
        *,
        name: str,
        base_url: str,
        model: str,
        api_key: str | None = None,
        identity: str | None = None,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = 5.0,
        connections: int = 1000,
        context: int | None = None,
        can: Mapping[str, bool] | None = None,
    ) -> None:
        self.name = name
        self._model = model
        self._base = _split(name, base_url)
        self._identity = identity or f"openai:{_normal(self._base)}:{model}"
        api_key = _checked_key(name, api_key)
        self._headers = _authorization(api_key, self._base)
        self._headers |= _checked_headers(name, headers or {})
        self._headers["content-type"] = "application/json"
        self._secrets = _secrets_of(api_key, headers or {}, self._base)
        self._connect_timeout = connect_timeout
        self._connections = connections
        self._client: Client | None = None
        self._tail = Bounds(0.1)
        self._origin = _address(self._base)
        self._paths = {route: _path(self._base, route) for route in _ROUTES.values()}
        if unknown := sorted(set(can or {}) - _FLAGS):
            raise ConfigurationError(
                f"upstreams.{name}.can: there is no {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(sorted(_FLAGS))}"
            )
        flags = {"verbatim": True, "completion": True, "schema": True, "tools": True, "embeddings": True} | dict(
            can or {}
        )
        # What an operator forbids is never tried, what an operator promises is.
        self._scoring = Trial(self._try_scoring, forbidden=flags.pop("loglikelihood", None) is False)
        self._capabilities = Capabilities(**flags, context=context)
        self._ways: dict[str, _Way] = {
            "echo": self._echo,
            "echo, one token more": self._longer_echo,
            "grammar": self._grammar,
            "prompt_logprobs": self._prompt_logprobs,
        }
        self._way = ""
        self._whole_token: int | None = None

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def address(self) -> str:
        """Scheme, host and port, for messages."""
        return self._origin

    # -- life

    async def open(self) -> None:
        base = self._base
        headers, connections, timeout = self._headers, self._connections, self._connect_timeout
        proxy = _proxy_of(base)
        if proxy is not None:
            proxied = await asyncio.to_thread(_proxied)
            self._client = proxied(
                origin=self._origin, headers=headers, connections=connections, connect_timeout=timeout, proxy=proxy
            )
            return
        port = base.port or (443 if base.scheme == "https" else 80)
        try:
            self._client = HTTPClient(
                scheme=base.scheme,
                host=base.hostname or "",
                port=port,
                headers=headers,
                connections=connections,
                connect_timeout=timeout,
            )
        except ValueError as error:
            raise ConfigurationError(f"upstreams.{self.name}.base_url: {error}") from None

    async def close(self) -> None:
        await self._scoring.close()
        if self._client is not None:
            await self._client.close()
            self._client = None

    # -- what it can do

    async def capabilities(self) -> Capabilities:
        """What it is taken to do; `loglikelihood` only once `detect` has proven it."""
        return replace(self._capabilities, loglikelihood=self._scoring.proven)

    async def detect(self) -> Capabilities:
        """Try, once, whether the server scores given text: a handful of short completions. See `Trial`."""
        await self._scoring.made()
        return await self.capabilities()

    async def _try_scoring(self) -> bool:
        if not self._capabilities.completion:
            return False
        ways = {name: _provable(_logprobs(way)) for name, way in self._ways.items()}
        way = await proven(_provable(self._generate), ways)
        self._way = way or ""
        return way is not None

    # -- one call

    async def send(self, call: Call, terms: Terms) -> Reply:
        """Answer one call; raises UpstreamError, and Unsupported on a score where none was proven possible."""
        if isinstance(call, Score):
            return await self._score(call)
        if terms.emit is None or isinstance(call, Embed):
            data, body = await self._posted(_ROUTES[call.kind], body_of(call, self._model, n=terms.n))
            reply = self._reply(body, call, verbatim=terms.verbatim is not None)
            if terms.verbatim is not None:
                await terms.verbatim(data)
            return reply
        return await self._stream(call, terms, terms.emit)

    async def forward(self, request: Forwarded) -> tuple[bytes, Told]:
        """As `send` with `Terms.verbatim`, of a request that is passed through."""
        sent = forwarded(request.params, request.messages, self._model)
        response = await self._asked("/chat/completions", sent, whole=True, resent=request.resent)
        try:
            data = response.whole_body() or await self._read(response)
        finally:
            response.release()
        body = self._json(data, response)
        told = told_of(body)
        if told is None:
            told = Told.of(self._reply(body, request.call()))
        else:
            self._look_at_finish(told.finish)
        return data, told

    def _reply(self, body: dict[str, Any], call: Chat | Completion | Embed, *, verbatim: bool = False) -> Reply:
        try:
            if verbatim and isinstance(call, Embed):
                reply = unread(body, call, upstream=self.name)
            else:
                reply = reply_of(body, call, upstream=self.name)
        except ValueError as error:
            raise self._broken(f"sent an answer that is none: {error}") from error
        self._look_at_finish(reply.finish)
        return reply

    async def forward_stream(
        self, request: Forwarded, usage_asked: bool, take: Callable[[bytes], Awaitable[None]], emit: Emit
    ) -> Told:
        """As `send` with `Terms.verbatim` and `Terms.emit`, of a request that is passed through."""
        sent = forwarded(request.params, request.messages, self._model, stream=True)
        response = await self._asked("/chat/completions", sent, whole=False, resent=request.resent)
        stream = Stream(take, usage_asked, emit, self._look_for_error)
        answered = await self._taken(response, stream, request.call)
        if isinstance(answered, Reply):
            return Told.of(answered)
        return answered.told() or Told.of(answered.reply(request.call(), upstream=self.name))

    async def _stream(self, call: Chat | Completion, terms: Terms, emit: Emit) -> Reply:
        body = body_of(call, self._model, stream=True, n=terms.n)
        response = await self._asked(_ROUTES[call.kind], body, whole=False)
        stream = Stream(terms.verbatim, terms.usage_asked, emit, self._look_for_error)
        answered = await self._taken(response, stream, lambda: call)
        return answered if isinstance(answered, Reply) else answered.reply(call, upstream=self.name)

    async def _taken(
        self, response: Response, stream: Stream, call: Callable[[], Chat | Completion]
    ) -> Reply | Assembly:
        """Take an answer in as it comes, and release it; a `Reply` where it was no stream."""
        try:
            if "event-stream" in response.content_type:
                await self._streamed(response, None, stream)
            else:
                # A server that does not stream answers whole; one that mislabels its stream is told by its first bytes.
                data = await self._read(response)
                if not data.lstrip().startswith((b"data:", b"event:", b":")):
                    return await self._unstreamed(self._json(data, response), call(), stream)
                await self._streamed(response, data, stream)
        finally:
            response.release()
        self._look_at_finish(stream.assembly.finish)
        return stream.assembly

    async def _unstreamed(self, answer: dict[str, Any], call: Chat | Completion, stream: Stream) -> Reply:
        try:
            reply = reply_of(answer, call, upstream=self.name)
            delta = Assembly().add(answer)
        except ValueError as error:
            raise self._broken(f"sent an answer that is none: {error}") from error
        self._look_at_finish(reply.finish)
        if stream.verbatim is not None:
            for made in as_chunks(answer, usage=stream.usage_asked):
                await stream.verbatim(b"data: " + orjson.dumps(made) + b"\n\n")
        if delta is not None:
            await stream.emit(delta)
        return reply

    async def _streamed(self, response: Response, data: bytes | None, stream: Stream) -> None:
        """Take a stream in as it comes, or one that has come whole as `data`."""
        size = 0
        try:
            while not stream.done:
                block = await self._block(response) if data is None else data
                if data is not None:
                    data = b""
                size += len(block)
                if size > STREAM_LIMIT:
                    raise Unreadable(f"more than {STREAM_LIMIT >> 20} MiB")
                await stream.take(block)
                if not block:
                    break
        except Unreadable as error:
            raise self._broken(f"sent a stream that is none: {error}") from error
        if not stream.done and stream.assembly.finish is None:
            raise self._broken("ended its stream before the answer had an end")
        if not response.ended:
            await self._drain(response)

    async def _drain(self, response: Response) -> None:
        """Take in the end of the body, which is on its way, so that the connection can be used again."""
        with suppress(TimeoutError, Cut, Encoded), self._tail():
            # A server that keeps the connection open after its last word only costs us that connection.
            while await response.block():
                pass

    def _look_at_finish(self, finish: str | None) -> None:
        if finish == "error":
            raise UpstreamUnavailable(f"{self._who} broke off its answer with finish_reason 'error'")

    # -- log-likelihood of given text

    async def _score(self, call: Score) -> Reply:
        if not call.continuation:
            return Reply(model=self._model, upstream=self.name)
        measure = self._ways.get(self._way) if await self._scoring.made() else None
        if measure is None:
            raise Unsupported(
                f"{self._who} does not give the log-likelihood of given text (tried: echo, a grammar of token "
                "literals, prompt_logprobs); give the scoring role an upstream that does"
            )
        try:
            logprobs, body = await measure(call.context, call.continuation)
        except ValueError as error:
            raise self._broken(f"sent log-probabilities that are none: {error}") from error
        model = str(body.get("model") or self._model)
        reply = Reply(logprobs=tuple(logprobs), model=model, upstream=self.name)
        return replace(reply, usage=usage_of(body.get("usage"), call, reply))

    async def _generate(self, prompt: str) -> Sequence[TokenLogprob]:
        return generated_of(await self._complete(prompt, max_tokens=PROBE_TOKENS, logprobs=1))

    async def _echo(self, context: str, continuation: str, more: int = 0) -> _Measured:
        body = await self._complete(context + continuation, echo=True, logprobs=1, max_tokens=more)
        return echoed(body, context, continuation, more=more), body

    async def _longer_echo(self, context: str, continuation: str) -> _Measured:
        """The same for servers that want to generate one token at least; it is paid for and dropped."""
        return await self._echo(context, continuation, more=1)

    async def _grammar(self, context: str, continuation: str) -> _Measured:
        """llama.cpp's server: force the tokens of the text by a grammar of token literals, and read what each would
        have been given; log-probabilities are taken before the grammar, so forcing does not change them.

        A token that is a part of a character cannot be forced (the grammar works on whole characters, and fails with
        a 500); its log-probability is looked up among those of all tokens in its place, which is slow and rare.
        """
        pieces = await self._tokenized(continuation)
        ids = [number for number, _ in pieces]
        tokens: list[TokenLogprob] = []
        usages: list[Mapping[str, Any]] = []
        model = ""
        while len(tokens) < len(ids):
            at = len(tokens)
            prompt: str | list[str | int] = [context, *ids[:at]] if at else context
            run = next((i for i in range(at, len(ids)) if not pieces[i][1]), len(ids))
            if run > at:
                found, body = await self._forced(prompt, ids[at:run])
            else:
                found, body = await self._looked_up(prompt, ids[at])
            tokens += found
            usages.append(mapping(body.get("usage")))
            model = str(body.get("model") or model)
        counted = ("prompt_tokens", "completion_tokens")
        usage = {name: sum(int(u.get(name) or 0) for u in usages) for name in counted} if all(usages) else {}
        return tuple(tokens), {"model": model, "usage": usage}

    async def _tokenized(self, text: str) -> list[tuple[int, bool]]:
        """The tokens of a text, and of each whether it is made of whole characters."""
        body = {"content": text, "add_special": False, "with_pieces": True}
        given = (await self._post("/tokenize", body, at_root=True)).get("tokens")
        pieces: list[tuple[int, bool]] = []
        for item in cast("list[object]", given) if isinstance(given, list) else []:
            # Bytes in place of a text are a part of a character. An older server gives numbers alone.
            number = item if isinstance(item, int) else mapping(item).get("id")
            if not isinstance(number, int):
                raise ValueError("a token has no number")
            pieces.append((number, not isinstance(mapping(item).get("piece"), list)))
        if not pieces:
            raise ValueError("no tokens came back")
        return pieces

    async def _forced(self, prompt: str | list[str | int], ids: list[int]) -> _Measured:
        grammar = "root ::= " + " ".join(f"<[{number}]>" for number in ids)
        body = await self._complete(prompt, max_tokens=len(ids), grammar=grammar, logprobs=1, n_probs=1)
        shape = mapping(first_choice(body).get("logprobs"))
        entries = cast("list[object]", shape.get("content") or [])
        tokens = logprobs_of(shape)
        if len(tokens) != len(ids):
            raise ValueError(f"{len(tokens)} log-probabilities for {len(ids)} tokens")
        if [mapping(entry).get("id") for entry in entries] != ids:
            raise ValueError("other tokens came back than were forced")
        return tokens, body

    async def _looked_up(self, prompt: str | list[str | int], number: int) -> _Measured:
        # Whatever is generated must be a whole character, or the server leaves its log-probabilities out.
        if self._whole_token is None:
            self._whole_token = (await self._tokenized("a"))[0][0]
        bias = [[self._whole_token, 1000]]
        body = await self._complete(prompt, max_tokens=1, logit_bias=bias, logprobs=_ALL, n_probs=_ALL)
        shape = mapping(first_choice(body).get("logprobs"))
        first = mapping(next(iter(cast("list[object]", shape.get("content") or [])), None))
        for other in cast("list[object]", first.get("top_logprobs") or []):
            entry = mapping(other)
            if entry.get("id") == number and (logprob := finite(entry.get("logprob"))) is not None:
                return [TokenLogprob(str(entry.get("token") or ""), logprob)], body
        raise ValueError("a token is not among those that came back")

    async def _prompt_logprobs(self, context: str, continuation: str) -> _Measured:
        """vLLM: the prompt's tokens in a field of their own, each with its own entry alone when 0 others are wanted."""
        body = await self._complete(context + continuation, max_tokens=1, prompt_logprobs=0)
        given = first_choice(body).get("prompt_logprobs", body.get("prompt_logprobs"))
        if not isinstance(given, list):
            raise ValueError("no `prompt_logprobs` came back")
        texts: list[str] = []
        numbers: list[float | None] = []
        missing = 0
        for place in cast("list[object]", given):
            entry = mapping(next(iter(mapping(place).values()), None))
            if not entry:
                # The first token has none, and so no text either; its text is what is left in front.
                missing += 1
                texts.append("")
                numbers.append(None)
                continue
            texts.append(str(entry.get("decoded_token") or ""))
            numbers.append(finite(entry.get("logprob")))
        asked = prompt_tokens(body)
        if missing > 1 or (asked is not None and len(texts) != asked):
            raise ValueError("not one log-probability for each token of the prompt")
        if missing:
            rest = "".join(texts)
            text = context + continuation
            texts[0] = text[: len(text) - len(rest)] if rest and text.endswith(rest) else texts[0]
        return continuation_of(context, continuation, texts, numbers), body

    async def _complete(self, prompt: str | list[str | int], **parameters: Any) -> dict[str, Any]:
        body = {"model": self._model, "prompt": prompt, "temperature": 0, **parameters}
        return await self._post("/completions", body)

    # -- HTTP

    @property
    def _who(self) -> str:
        return f'upstream "{self.name}"'

    def _broken(self, what: str) -> UpstreamBroken:
        return UpstreamBroken(f"{self._who} {what}")

    async def _post(self, route: str, body: Mapping[str, Any], *, at_root: bool = False) -> dict[str, Any]:
        return (await self._posted(route, body, at_root=at_root))[1]

    async def _posted(
        self, route: str, body: Mapping[str, Any], *, at_root: bool = False
    ) -> tuple[bytes, dict[str, Any]]:
        """The answer as it came, and read."""
        response = await self._asked(route, body, whole=True, at_root=at_root)
        try:
            data = await self._read(response)
        finally:
            response.release()
        return data, self._json(data, response)

    async def _asked(
        self,
        route: str,
        body: Mapping[str, Any],
        *,
        whole: bool,
        at_root: bool = False,
        resent: Callable[[], object] = tracing.record_resent,
    ) -> Response:
        """A response of status 200, to be released by the caller; anything else is raised.

        A server may close an idle connection at the moment that we send on it (llama.cpp's does so after each stream).
        What was sent there was not read, so the client sends it again, on another; on a fresh one it does not.
        """
        if self._client is None:
            raise RuntimeError(f"{self._who} is not open")
        path = self._paths.get(route) if not at_root else None
        try:
            response = await self._client.send(
                path or _path(self._base, route, at_root=at_root),
                orjson.dumps(body),
                more=tracing.outgoing(self._origin),
                whole=whole,
                resent=resent,
            )
        except (Unreached, NotInTime) as error:
            raise self._unreached(error) from error
        if response.status != 200:
            try:
                raise await self._refused(response, route)
            finally:
                response.release()
        return response

    async def _block(self, response: Response) -> bytes:
        try:
            return await response.block()
        except Cut as error:
            raise UpstreamBroken(
                f"{self._who}: {self.address} broke the connection off in the middle of its answer", code=_CUT
            ) from error
        except Encoded as error:
            raise self._broken(f"sent its answer in the encoding {str(error)!r}, which was not asked for") from error

    def _unreached(self, error: Unreached | NotInTime) -> UpstreamError:
        if isinstance(error, NotInTime):
            return UpstreamTimeout(
                f"{self._who}: no connection to {self.address} within {self._connect_timeout:g} s; is it up, and is "
                f"upstreams.{self.name}.base_url right?"
            )
        why = scrubbed(error.why, self._secrets)[:200]
        return UpstreamUnreachable(
            f"{self._who}: {self.address} is not reached: {why}; check {error.check} (upstreams.{self.name}.base_url)"
        )

    async def _refused(self, response: Response, route: str) -> UpstreamError:
        try:
            data = await self._read(response)
        except UpstreamBroken as error:
            if not isinstance(error.__cause__, Encoded):
                raise
            data = b""  # That it refuses, and why, is told by its status already.
        if 300 <= response.status < 400:
            place = urlsplit(response.headers.get("location", ""))
            return UpstreamError(
                f"{self._who} redirects to {_address(place) if place.netloc else 'another path'}; "
                f"set upstreams.{self.name}.base_url to where it leads"
            )
        refusal = refusal_of(response.status, self._object(data), response.headers, time.time())
        return self._error(refusal, f" {route}")

    def _error(self, refusal: Refusal, where: str = "") -> UpstreamError:
        return error_of(
            refusal,
            who=self._who,
            key_setting=f"upstreams.{self.name}.api_key",
            model=self._model,
            where=where,
            secrets=self._secrets,
        )

    def _look_for_error(self, body: Mapping[str, Any]) -> None:
        if (refusal := embedded_error(body)) is not None:
            raise self._error(refusal)

    async def _read(self, response: Response) -> bytes:
        data = await self._block(response)
        if not response.ended:
            parts, size = [data], len(data)
            while data and size <= BODY_LIMIT:
                data = await self._block(response)
                parts.append(data)
                size += len(data)
            data = b"".join(parts)
        if len(data) > BODY_LIMIT:
            raise self._broken(f"sent more than {BODY_LIMIT >> 20} MiB for one answer")
        return data

    def _json(self, data: bytes, response: Response) -> dict[str, Any]:
        body = self._object(data)
        if body is None:
            raise self._broken(
                f"sent {response.content_type or 'something'} that is no JSON object (HTTP 200); does "
                f"upstreams.{self.name}.base_url end where the API begins, as in .../v1?"
            )
        self._look_for_error(body)
        return body

    @staticmethod
    def _object(data: bytes) -> dict[str, Any] | None:
        try:
            body: Any = orjson.loads(data)
        except orjson.JSONDecodeError:
            return None
        return cast("dict[str, Any]", body) if isinstance(body, dict) else None


_Measured: TypeAlias = tuple[Sequence[TokenLogprob], Mapping[str, Any]]
_Way: TypeAlias = Callable[[str, str], Awaitable[_Measured]]


def _provable(ask: Callable[_P, Awaitable[_T]]) -> Callable[_P, Awaitable[_T]]:
    """A refusal, a missing route or a strange answer says that it cannot be done, which `proven` wants as ValueError.

    That nothing came back says nothing, and stays an error.
    """

    async def asked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await ask(*args, **kwargs)
        except UpstreamError as error:
            if isinstance(error, UpstreamRejected) or error.code in _SAYS_NO:
                raise ValueError(str(error)) from error
            raise

    return asked


def _logprobs(way: _Way) -> Callable[[str, str], Awaitable[Sequence[TokenLogprob]]]:
    async def measure(context: str, continuation: str) -> Sequence[TokenLogprob]:
        return (await way(context, continuation))[0]

    return measure


# --- addresses and keys ---------------------------------------------------------------------------------------------


def _split(name: str, base_url: str) -> SplitResult:
    setting = f"upstreams.{name}.base_url"
    try:
        base = urlsplit(base_url.strip())
        right = base.scheme in ("http", "https") and bool(base.hostname) and base.port != 0
    except ValueError:
        raise ConfigurationError(f"{setting} is no address; write it as http://127.0.0.1:11434/v1") from None
    if not right:
        raise ConfigurationError(f"{setting} is no address of http or https; write it as http://127.0.0.1:11434/v1")
    for route in _ROUTES.values():
        if base.path.rstrip("/").endswith(route):
            raise ConfigurationError(f"{setting} ends in {route}; leave that off, it is added for each kind of call")
    return base


def _path(base: SplitResult, route: str, *, at_root: bool = False) -> str:
    """Path and query, as the request line has them."""
    path = base.path.rstrip("/")
    if at_root:
        path = path.removesuffix("/v1")
    query = f"?{quote(base.query, safe=_QUOTED)}" if base.query else ""
    return quote(path, safe=_QUOTED) + route + query


def _address(base: SplitResult) -> str:
    """Scheme, host and port; never the user and password that a URL may hold."""
    host = base.hostname or ""
    host = f"[{host}]" if ":" in host else host
    port = "" if base.port in (None, {"http": 80, "https": 443}.get(base.scheme)) else f":{base.port}"
    return f"{base.scheme}://{host}{port}"


def _normal(base: SplitResult) -> str:
    return _address(base) + base.path.rstrip("/")


def _proxy_of(base: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for the address (HTTPS_PROXY, NO_PROXY and the like).

    A proxy is for the way out, so an address on this machine has none.
    """
    host = base.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    proxies = getproxies()
    found = urlsplit(proxies.get(base.scheme) or proxies.get("all") or "")
    return found if found.scheme in ("http", "https") and found.hostname else None


def _proxied() -> type[ProxiedClient]:
    """aiohttp takes a while to be imported, and is of use only where there is a proxy."""
    from asmodel_plugins.openai_proxied import ProxiedClient

    return ProxiedClient


def _authorization(key: str, base: SplitResult) -> dict[str, str]:
    """By our key, or else by the name and password in the address."""
    if key:
        return {"authorization": f"Bearer {key}"}
    if base.username is None:
        return {}
    pair = f"{unquote(base.username)}:{unquote(base.password or '')}"
    return {"authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _checked_headers(name: str, headers: Mapping[str, str]) -> dict[str, str]:
    try:
        return dict(checked(header, value) for header, value in headers.items())
    except ValueError as error:
        raise ConfigurationError(f"upstreams.{name}.headers: {error}") from None


def _checked_key(name: str, api_key: str | None) -> str:
    key = (api_key or "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigurationError(f"upstreams.{name}.api_key holds characters that no HTTP header can carry")
    return key


def _secrets_of(key: str, headers: Mapping[str, str], base: SplitResult) -> tuple[str, ...]:
    """What no message may show. A header's value that is short is a version or a flag, not a key."""
    return tuple(secret for secret in (key, base.password, *(v for v in headers.values() if len(v) >= 8)) if secret)
