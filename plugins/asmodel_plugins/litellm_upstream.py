"""Any provider that litellm knows, through its completion functions only: retries, cache and traces are asmodel's own.

Importing litellm takes seconds and some 200 MB, so it happens in `open`, in a thread, and only where an upstream of
this kind is in the settings; several of them share it. For a server that speaks OpenAI's API the `openai` kind is some
twenty times cheaper per call (measured on litellm 1.106).
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import re
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import fields, replace
from typing import Any, cast
from urllib.parse import urlsplit

import orjson

from asmodel import tracing
from asmodel.calls import Call, Capabilities, Chat, Completion, Embed, Reply, Score, Terms, TokenLogprob, Usage
from asmodel.dialect import Assembly, Refusal, body_of, error_of, mapping, refusal_of, reply_of, scrubbed, usage_of
from asmodel.errors import (
    ConfigurationError,
    Unsupported,
    UpstreamAuth,
    UpstreamBroken,
    UpstreamError,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from asmodel.likelihood import PROBE_TOKENS, Trial, echoed, generated_of, proven

_FLAGS = frozenset(f.name for f in fields(Capabilities)) - {"context"}

_RAW = frozenset({"openai", "text-completion-openai", "custom_openai"})
"""Providers whose text completions are raw text. For the others litellm would wrap the prompt in a chat message."""

_KNOWN = frozenset(
    {
        "audio",
        "best_of",
        "dimensions",
        "echo",
        "encoding_format",
        "frequency_penalty",
        "function_call",
        "functions",
        "input",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "modalities",
        "model",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "stream",
        "stream_options",
        "suffix",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    }
)
"""What a call's parameters may set by name. litellm's functions also take where to send the key and much else by name
(`api_base`, `mock_response`, ...), which is the operator's to say and never a client's; whatever is not listed here
goes into the provider's body."""

_UNREACHED = frozenset(
    {
        "APIConnectionError",
        "ClientConnectorError",
        "ConnectError",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "ReadError",
        "RemoteProtocolError",
        "ServerDisconnectedError",
        "gaierror",
    }
)
_NO_KEY = re.compile(r"missing (credentials|.{0,40}api[ _]key)|api_key .{0,60}(must|has to) be set", re.IGNORECASE)
_VARIABLE = re.compile(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*_(?:KEY|TOKEN|SECRET)\b")

_SECRET = re.compile(r"key|token|secret|password|credential", re.IGNORECASE)

_open: weakref.WeakSet[LiteLLMUpstream] = weakref.WeakSet()
"""litellm keeps its connections in one place for the whole process; whoever closes last closes them."""


class LiteLLMUpstream:
    """A model by litellm's name for it, as `anthropic/claude-sonnet-4-5` or `bedrock/...`.

    `api_key` where it is None is read by litellm from the provider's usual variable. `base_url` in place of the
    provider's own. `identity` is who answers, for the cache key; by default the model's name, and `base_url` if given.
    `connect_timeout` in seconds. `options` are further keyword arguments of litellm's functions (`api_version`,
    `aws_region_name`, `extra_headers`, ...). `context` in tokens; by default what litellm knows of the model. `can`
    corrects what litellm knows; log-likelihood it may forbid but not assert: that is proven by trying, in `detect`.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        api_key: str | None = None,
        base_url: str | None = None,
        identity: str | None = None,
        connect_timeout: float = 5.0,
        options: Mapping[str, Any] | None = None,
        context: int | None = None,
        can: Mapping[str, bool] | None = None,
    ) -> None:
        self.name = name
        self._model = model
        self._key = (api_key or "").strip() or None
        self._base_url = base_url.rstrip("/") if base_url else None
        where = f":{_without_password(self._base_url)}" if self._base_url else ""
        self._identity = identity or f"litellm:{model}{where}"
        self._connect_timeout = connect_timeout
        self._options = dict(options or {})
        self._can = dict(can or {})
        if unknown := sorted(set(self._can) - _FLAGS):
            raise ConfigurationError(
                f"upstreams.{name}.can: there is no {', '.join(map(repr, unknown))}; "
                f"there are {', '.join(sorted(_FLAGS))}"
            )
        self._context = context
        self._litellm: Any = None
        self._client: Any = None
        self._fixed: dict[str, Any] = {}
        self._capabilities = Capabilities(context=context)
        # What an operator forbids is never tried, what an operator promises is.
        self._scoring = Trial(self._try_scoring, forbidden=self._can.pop("loglikelihood", None) is False)
        self._more = 0

    @property
    def identity(self) -> str:
        return self._identity

    # -- life

    async def open(self) -> None:
        """Import litellm, in a thread, and learn what it knows of the model."""
        self._litellm = await asyncio.to_thread(_import)
        self._fixed = {
            "api_base": self._base_url,
            "api_key": self._key,
            "timeout": self._litellm.httpx.Timeout(None, connect=self._connect_timeout),
            **self._options,
            # Each of these is done once, visibly, by the layers around this upstream.
            "num_retries": 0,
            "max_retries": 0,
            "caching": False,
        }
        self._fixed = {key: value for key, value in self._fixed.items() if value is not None}
        self._capabilities = await asyncio.to_thread(self._known)
        _open.add(self)

    async def close(self) -> None:
        await self._scoring.close()
        if self._client is not None:
            await self._client.close()
            self._client = None
        _open.discard(self)
        if self._litellm is not None and not _open:
            await _close(self._litellm)
        self._litellm = None

    def _known(self) -> Capabilities:
        """What litellm knows of the model; of one that it does not know, what most can do."""
        litellm = self._litellm
        try:
            provider = str(litellm.get_llm_provider(self._model, api_base=self._base_url)[1])
        except litellm.BadRequestError:
            raise ConfigurationError(
                f"upstreams.{self.name}.model: litellm knows no provider of {self._model!r}; write PROVIDER/MODEL, as "
                "openai/gpt-4o-mini or anthropic/claude-sonnet-4-5"
            ) from None
        info: Mapping[str, Any] = {}
        # It raises an own error of no public class for a model that it has no data of.
        with suppress(Exception):
            info = mapping(dict(litellm.get_model_info(self._model)))
        mode = info.get("mode")
        flags = {
            "chat": mode != "embedding",
            "completion": provider in _RAW,
            "schema": info.get("supports_response_schema") is not False,
            "tools": info.get("supports_function_calling") is not False,
            "embeddings": mode in (None, "embedding"),
        }
        context = info.get("max_input_tokens")
        known = context if isinstance(context, int) else None
        return Capabilities(**(flags | self._can), context=self._context or known)

    # -- what it can do

    async def capabilities(self) -> Capabilities:
        """What it is taken to do; `loglikelihood` only once `detect` has proven it."""
        return replace(self._capabilities, loglikelihood=self._scoring.proven)

    async def detect(self) -> Capabilities:
        """Try, once, whether the provider scores given text through litellm: a few short completions. See `Trial`."""
        await self._scoring.made()
        return await self.capabilities()

    async def _try_scoring(self) -> bool:
        if not self._capabilities.completion:
            return False
        way = await proven(self._generate, {"0": self._measuring(0), "1": self._measuring(1)})
        self._more = int(way or 0)
        return way is not None

    async def _generate(self, prompt: str) -> Sequence[TokenLogprob]:
        with _as_disproof():
            return generated_of(await self._complete(prompt, max_tokens=PROBE_TOKENS, logprobs=1))

    def _measuring(self, more: int) -> Callable[[str, str], Awaitable[Sequence[TokenLogprob]]]:
        async def measure(context: str, continuation: str) -> Sequence[TokenLogprob]:
            with _as_disproof():
                return echoed(await self._echo(context, continuation, more), context, continuation, more=more)

        return measure

    async def _echo(self, context: str, continuation: str, more: int) -> dict[str, Any]:
        return await self._complete(context + continuation, echo=True, logprobs=1, max_tokens=more)

    async def _complete(self, prompt: str, **parameters: Any) -> dict[str, Any]:
        call = Completion(identity=self._identity, prompt=prompt, params={"temperature": 0, **parameters})
        async with self._asking(call) as response:
            return _plain(response)

    # -- one call

    async def send(self, call: Call, terms: Terms) -> Reply:
        """Answer one call; raises UpstreamError, and Unsupported on what the model does not do."""
        if isinstance(call, Score):
            return replace(await self._score(call), upstream=self.name)
        if isinstance(call, Completion) and not self._capabilities.completion:
            raise Unsupported(f"{self._who} has no raw completions; a step that returns a str is asked by chat")
        if terms.emit is None or isinstance(call, Embed):
            async with self._asking(call) as response:
                body = _plain(response)
            try:
                reply = reply_of(body, call)
            except ValueError as error:
                raise UpstreamBroken(f"{self._who} sent an answer that is none: {error}") from error
        else:
            reply = await self._stream(call, terms)
        return replace(reply, upstream=self.name, cost=self._cost(reply.usage))

    async def _stream(self, call: Chat | Completion, terms: Terms) -> Reply:
        emit = terms.emit
        assert emit is not None
        assembly = Assembly()
        async with self._asking(call, stream=True) as stream:
            chunks = aiter(stream)
            while True:
                try:
                    chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
                except Exception as error:
                    raise self._mapped(error) from None
                try:
                    delta = assembly.add(_plain(chunk))
                except ValueError as error:
                    raise UpstreamBroken(f"{self._who} sent a stream that is none: {error}") from error
                if delta is not None:
                    await emit(delta)
            # litellm writes a finish of its own where the provider's stream ended without one.
            wrapper = getattr(stream, "completion_stream", None) if isinstance(call, Completion) else stream
            if getattr(wrapper, "received_finish_reason", "") is None:
                raise UpstreamBroken(f"{self._who} ended its stream before the answer had an end")
        return assembly.reply(call)

    async def _score(self, call: Score) -> Reply:
        if not call.continuation:
            return Reply(model=self._model)
        if not await self._scoring.made():
            raise Unsupported(
                f"{self._who} does not give the log-likelihood of given text (tried: echo); give the scoring role an "
                "upstream that does"
            )
        body = await self._echo(call.context, call.continuation, self._more)
        try:
            logprobs = echoed(body, call.context, call.continuation, more=self._more)
        except ValueError as error:
            raise UpstreamBroken(f"{self._who} sent log-probabilities that are none: {error}") from error
        reply = Reply(logprobs=logprobs, model=str(body.get("model") or self._model))
        reply = replace(reply, usage=usage_of(body.get("usage"), call, reply))
        return replace(reply, cost=self._cost(reply.usage))

    def _cost(self, usage: Usage) -> float | None:
        """US dollars by litellm's price list; None where it has no price. A price of 0 in it is of models that run on
        one's own machine, where it says nothing about what that costs."""
        try:
            asked, said = self._litellm.cost_per_token(
                model=self._model,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                cache_read_input_tokens=usage.cached_tokens,
            )
            return float(asked + said) or None
        except Exception:
            # Of no public class, and there are several: a model that is not in the list is no failure of the call.
            return None

    # -- litellm

    @property
    def _who(self) -> str:
        return f'upstream "{self.name}"'

    @asynccontextmanager
    async def _asking(self, call: Chat | Completion | Embed, *, stream: bool = False) -> AsyncGenerator[Any]:
        """litellm's response, or its stream, closed at the end. What litellm raises is raised as ours."""
        litellm = self._litellm
        if litellm is None:
            raise RuntimeError(f"{self._who} is not open")
        body = body_of(call, self._model, stream=stream)
        if isinstance(call, Embed):
            # Few providers have more than one, and it is numbers that a reply holds, whatever its client is sent.
            body.pop("encoding_format", None)
        arguments = {key: value for key, value in body.items() if key in _KNOWN}
        rest = {key: value for key, value in body.items() if key not in _KNOWN}
        arguments |= self._fixed
        if rest:
            arguments["extra_body"] = {**mapping(self._fixed.get("extra_body")), **rest}
        # Where a provider is without an address of ours, litellm alone knows, and nothing of the trace is told.
        if self._base_url and (trace := tracing.outgoing(self._base_url)):
            arguments["extra_headers"] = {**mapping(self._fixed.get("extra_headers")), **trace}
        if isinstance(call, Completion):
            ask = litellm.atext_completion
            arguments["client"] = self._raw_client()
        else:
            ask = litellm.aembedding if isinstance(call, Embed) else litellm.acompletion
        try:
            response = await ask(**arguments)
        except Exception as error:
            # No chain: the errors underneath hold the request, the key and all.
            raise self._mapped(error) from None
        try:
            yield response
        finally:
            for part in (response, getattr(response, "completion_stream", None)) if stream else ():
                if callable(close := getattr(part, "aclose", None)):
                    await cast("Awaitable[None]", close())

    def _raw_client(self) -> Any:
        """The client of raw completions: litellm makes a new one for each call, and leaves it open."""
        if self._client is None:
            self._client = self._litellm.AsyncOpenAI(
                api_key=self._key or os.environ.get("OPENAI_API_KEY") or "none",
                base_url=self._base_url,
                timeout=self._fixed["timeout"],
                max_retries=0,
            )
        return self._client

    def _mapped(self, error: Exception) -> UpstreamError:
        litellm = self._litellm
        secrets = [*self._secrets()]
        said = scrubbed(_said(error), secrets)[:500]
        if isinstance(error, litellm.AuthenticationError) or _NO_KEY.search(said):
            return self._auth(error)
        if isinstance(error, litellm.Timeout):
            return UpstreamTimeout(f"{self._who} did not answer in time")
        names = {type(e).__name__ for e in _chain(error) if not isinstance(e, litellm.APIConnectionError)}
        if names & _UNREACHED or said.endswith("Connection error."):
            where = _without_password(self._base_url) if self._base_url else "its provider"
            return UpstreamUnreachable(
                f"{self._who}: {where} is not reached; check that it is up, and upstreams.{self.name}.base_url"
            )
        status = getattr(error, "status_code", None)
        refusal = refusal_of(
            status if isinstance(status, int) else 502, getattr(error, "body", None), _headers(error), time.time()
        )
        refusal = replace(refusal, message=said)
        if isinstance(error, litellm.ContextWindowExceededError):
            refusal = replace(refusal, status=400, code="context_length_exceeded")
        elif isinstance(error, litellm.ContentPolicyViolationError):
            refusal = replace(refusal, status=400, code="content_filter")
        elif isinstance(error, litellm.RateLimitError) and "insufficient_quota" in said:
            refusal = replace(refusal, code="insufficient_quota")
        if refusal.status in (401, 403):
            return self._auth(error)
        return self._error(refusal, secrets)

    def _error(self, refusal: Refusal, secrets: Sequence[str]) -> UpstreamError:
        setting = f"upstreams.{self.name}.api_key"
        return error_of(refusal, who=self._who, key_setting=setting, model=self._model, secrets=secrets)

    def _auth(self, error: Exception) -> UpstreamAuth:
        """Names the variable that is missing, where litellm can say which; never what the provider said."""
        missing: list[str] = []
        if self._key is None:
            with suppress(Exception):
                missing = [str(name) for name in self._litellm.validate_environment(self._model)["missing_keys"]]
            missing = missing or [name for name in _VARIABLE.findall(_said(error)) if name not in os.environ][:1]
        setting = f"upstreams.{self.name}.api_key"
        if missing:
            return UpstreamAuth(f"{self._who} has no key: set {' and '.join(missing)}, or {setting}")
        return UpstreamAuth(f"{self._who} refuses our key: look at {setting}, or the provider's variable")

    def _secrets(self) -> Iterator[str]:
        if self._key:
            yield self._key
        for named in (self._options, os.environ):
            for name, value in named.items():
                if isinstance(value, str) and len(value) >= 8 and _SECRET.search(name):
                    yield value
        for value in mapping(self._options.get("extra_headers")).values():
            yield str(value)


def _import() -> Any:
    """litellm, made quiet. Runs in a thread: the import takes seconds."""
    # Without it the import fetches a price list over the network, and waits where there is none.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        litellm: Any = importlib.import_module("litellm")
    except ImportError as error:
        raise ConfigurationError(f"litellm cannot be imported: {error}; an upstream of this kind needs it") from error
    for name in ("callbacks", "success_callback", "failure_callback", "_async_success_callback"):
        setattr(litellm, name, [])
    litellm.suppress_debug_info = True
    litellm.drop_params = False
    litellm.modify_params = False
    litellm.telemetry = False
    litellm.cache = None
    for name in ("LiteLLM", "LiteLLM Router", "LiteLLM Proxy"):
        # Its warnings and errors quote requests; what matters of them is raised.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return litellm


async def _close(litellm: Any) -> None:
    """End what litellm leaves running on this event loop: its worker, and the clients that it keeps."""
    worker = importlib.import_module("litellm.litellm_core_utils.logging_worker").GLOBAL_LOGGING_WORKER
    with suppress(TimeoutError):
        async with asyncio.timeout(2):
            await worker.flush()
    await worker.stop()
    await importlib.import_module("litellm.llms.custom_httpx.async_client_cleanup").close_litellm_async_clients()
    litellm.in_memory_llm_clients_cache.flush_cache()


class _as_disproof:
    """A refusal or a strange answer says that it cannot be done, which `proven` wants as ValueError."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        no = isinstance(error, (UpstreamRejected, UpstreamBroken))
        if no or (isinstance(error, UpstreamError) and error.code == "upstream_model_not_found"):
            raise ValueError(str(error)) from error


def _plain(response: Any) -> dict[str, Any]:
    """A response or a chunk of litellm's as the JSON that it stands for."""
    body = cast("dict[str, Any]", response.model_dump())
    for choice in cast("list[dict[str, Any]]", body.get("choices") or []):
        for part in ("message", "delta"):
            said = mapping(choice.get(part))
            refusal = mapping(said.get("provider_specific_fields")).get("refusal")
            if refusal and not said.get("refusal"):
                choice[part] = {**said, "refusal": refusal}
    return body


def _said(error: Exception) -> str:
    """The provider's own words: without litellm's prefixes, and of a JSON body its message."""
    text = str(getattr(error, "message", "") or error)
    text = re.sub(r"^(?:litellm\.\w+: )?(?:\w+Error: )?(?:\w+Exception - )?", "", text.strip())
    if text.startswith("{"):
        with suppress(orjson.JSONDecodeError):
            return refusal_of(0, orjson.loads(text), {}, 0.0).message or "no reason given"
    return text


def _headers(error: Exception) -> Mapping[str, str]:
    for source in (
        getattr(error, "litellm_response_headers", None),
        getattr(getattr(error, "response", None), "headers", None),
    ):
        if source:
            return {str(name).lower(): str(value) for name, value in dict(source).items()}
    return {}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
