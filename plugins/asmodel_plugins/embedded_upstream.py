"""The embedded model: SmolLM2-135M-Instruct, or a GGUF file of one's own, run by llama.cpp in one child process.

`EmbeddedChild` (embedded_process.py) owns the process; `EmbeddedUpstream` asks it. An upstream that finds a child
announced under its name uses that, and any other starts its own.

What the rest of this file is shaped by (llama.cpp as in xllamacpp 2026.10.11549, all tried):
- A caller who leaves is noticed only where the server writes to him. So every generation is asked for as a stream,
  with progress of the prompt, whoever wants it whole gets it assembled here.
- Its connections are not kept: reused after a stream they were found closed.
- There is no echo of a prompt's log-probabilities. A given text is measured by forcing its tokens; see `_measure`.
- One call at a time, equal calls at temperature 0 have equal answers, from a cached prompt too. Calls that run at the
  same time are computed in one batch, whose shape moves each log-probability by some hundredths of a nat: texts at
  temperature 0 then part where two tokens are nearly as likely. `slots = 1` is for whoever needs the first.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson

from asmodel.calls import (
    Call,
    Capabilities,
    Chat,
    Completion,
    Delta,
    Embed,
    Reply,
    Score,
    Terms,
    TokenLogprob,
    Usage,
    pieces,
)
from asmodel.dialect import (
    Assembly,
    body_of,
    embedded_error,
    error_of,
    finite,
    logprobs_of,
    mapping,
    refusal_of,
    reply_of,
)
from asmodel.errors import (
    ConfigurationError,
    Unsupported,
    UpstreamBroken,
    UpstreamError,
    UpstreamRejected,
    UpstreamUnavailable,
    UpstreamUnreachable,
)
from asmodel.gathering import gather

from . import embedded_weights
from .embedded_child import ROOM
from .embedded_process import (
    ADDRESS_VARIABLE,
    CONTEXT,
    KEY_VARIABLE,
    SLOTS,
    EmbeddedChild,
    announced,
    announcement,
    check_engine,
    json_object,
)

PATIENCE_SECONDS = 10.0
"""How long a call waits for a child that is being started again; this model takes half a second."""
EVENT_LIMIT = 64 * 1024 * 1024


class EmbeddedUpstream:
    """The embedded model as an upstream.

    `path` is a GGUF file of one's own; `context` in tokens for one call, prompt and reply; `slots` calls are answered
    at the same time, more wait; `threads` None for one less than there are cores. `address` (as
    `http://127.0.0.1:PORT`) is of a child that somebody else has started, and `key_file` a file that holds its key and
    nothing else; without a `key_file` the key is that of the announcement. `cache_dir` is where the weights are kept.

    It serves once `open` has returned; `identity` is known from then on.
    """

    priced = True  # It costs nothing a token.

    def __init__(
        self,
        *,
        name: str = "default",
        path: str | None = None,
        context: int = CONTEXT,
        slots: int = SLOTS,
        threads: int | None = None,
        address: str | None = None,
        key_file: str | None = None,
        cache_dir: str | None = None,
        progress: embedded_weights.Progress | None = None,
    ) -> None:
        if key_file is not None and address is None:
            raise ConfigurationError(f"upstreams.{name}.key_file is the key to an address; set `address` too")
        self.name = name
        self._address, self._key_file = address, key_file
        self._path = path
        self._cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self._prepared: EmbeddedChild | None = None
        self._make_child: Callable[[str | None], EmbeddedChild] = lambda key: EmbeddedChild(
            name=name,
            key=key,
            path=path,
            context=context,
            slots=slots,
            threads=threads,
            cache_dir=self._cache_dir,
            progress=progress or embedded_weights.progress_line(sys.stderr),
        )
        if address is None:
            self._make_child(None)  # so that wrong settings are refused now
        self._child: EmbeddedChild | None = None
        self._session: aiohttp.ClientSession | None = None
        self._model = _Model()
        self._room = _Room(slots, context * ROOM)

    @property
    def identity(self) -> str:
        return self._model.identity

    @property
    def child(self) -> EmbeddedChild | None:
        """The child that this upstream started, while it runs; None where it shares another's."""
        return self._child

    async def capabilities(self) -> Capabilities:
        """Known once open."""
        return Capabilities(
            chat=True,
            completion=True,
            stream=True,
            schema=True,
            tools=self._model.tools,
            loglikelihood=True,
            embeddings=True,
            context=self._model.context,
        )

    def prepare(self, progress: Callable[[str, int, int], None], *, shared: bool) -> Mapping[str, str]:
        """Fetch the weights; where several processes share the child, start it and announce it to them too."""
        if self._address is not None:
            return {}
        check_engine(self.name)
        if self._path is None:
            embedded_weights.fetch(self._cache_dir, lambda done, total: progress("the embedded model", done, total))
        if not shared:
            return {}
        child = self._prepared = self._make_child(os.environ.get(KEY_VARIABLE))
        child.start()
        others = os.environ.get(ADDRESS_VARIABLE, "")
        own = announcement([child])
        return {**own, ADDRESS_VARIABLE: f"{others} {own[ADDRESS_VARIABLE]}".strip()}

    def release(self) -> None:
        """Stop the child that `prepare` started."""
        if self._prepared is not None:
            self._prepared.stop()
            self._prepared = None

    async def open(self) -> None:
        """Start the child, or find the one that is announced; a first start downloads 93 MB. Raises ConfigurationError
        where that cannot be, and UpstreamError where a child that is announced does not answer."""
        if self._session is not None:
            return
        if self._address is not None:
            address, key = self._address, await asyncio.to_thread(self._key)
        elif (found := announced(self.name)) is not None:
            address, key = found
        else:
            child = self._child = self._make_child(None)
            try:
                await asyncio.to_thread(child.start)
            except BaseException:
                await self._stop_child()
                raise
            address, key = child.address, child.key
        self._session = aiohttp.ClientSession(
            address,
            headers={"authorization": f"Bearer {key}"},
            # Without a limit: the room below is one, and counting tokens must not wait for it.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        try:
            self._model = await self._ask_for_model()
        except BaseException:
            await self.close()
            raise
        self._room = _Room(self._model.slots, self._model.context * ROOM)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None
        await self._stop_child()

    async def _stop_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await asyncio.shield(asyncio.to_thread(child.stop))

    def _key(self) -> str:
        if self._key_file is None:
            return os.environ.get(KEY_VARIABLE, "")
        file = Path(self._key_file).expanduser()
        try:
            return file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigurationError(f"upstreams.{self.name}.key_file: {file} cannot be read: {error}") from error

    async def _ask_for_model(self) -> _Model:
        props = await self._get("/props")
        listed = cast("list[object]", (await self._get("/v1/models")).get("data") or [None])
        about = mapping(listed[0])
        tags = [str(tag) for tag in cast("list[object]", about.get("tags") or [])]
        identity = next((tag for tag in tags if tag.startswith("embedded:")), "")
        context = mapping(props.get("default_generation_settings")).get("n_ctx")
        slots, meta = props.get("total_slots"), mapping(about.get("meta"))
        vocabulary, width = meta.get("n_vocab"), meta.get("n_embd")
        if not (identity and isinstance(context, int) and isinstance(slots, int) and isinstance(vocabulary, int)):
            raise self._broken("does not say what it runs; is it a child of asmodel's own?")
        lead = await self._tokens("", add_special=True)
        begin = str(props.get("bos_token") or "")
        return _Model(
            name=str(about.get("id") or ""),
            identity=identity,
            context=context,
            slots=slots,
            vocabulary=vocabulary,
            width=width if isinstance(width, int) else 0,
            tools=mapping(props.get("chat_template_caps")).get("supports_tools") is True,
            lead=tuple(lead[:1]),
            begin=tuple(await self._tokens(begin, parse_special=True))[:1] if begin else (),
        )

    # -- one call

    async def send(self, call: Call, terms: Terms) -> Reply:
        """Answer one call. Raises UpstreamError, and Unsupported on what this model does not do."""
        if isinstance(call, Embed):
            reply = await self._embed(call, terms)
        else:
            reply = await (self._score(call, terms) if isinstance(call, Score) else self._generate(call, terms))
        # Its price is known: it runs on this machine, and costs nothing a token.
        return replace(reply, upstream=self.name, cost=0.0)

    async def count(self, text: str) -> int:
        """Tokens of a text; what looks like a special token in it is text."""
        return len(await self._tokens(text))

    async def _generate(self, call: Chat | Completion, terms: Terms) -> Reply:
        self._refuse(call)
        body = body_of(call, self._model.name, stream=True) | {"return_progress": True}
        if isinstance(call, Chat):
            route, param = "/v1/chat/completions", "messages"
            text = "\n".join(message.text for message in call.messages)
            # What the template puts around a message is less than 8 tokens, and 24 for a system message of its own.
            asked = await self.count(text) + 8 * len(call.messages) + 24
        else:
            route, param = "/v1/completions", "prompt"
            given = call.prompt if call.given is None else call.given
            asked = sum([await self._length(piece, param) for piece in pieces(given)])
            if body.get("logprobs") is True:
                # The chat's way of asking, which this route would read as the number 1.
                body["logprobs"] = max(1, int(body.pop("top_logprobs", 1)))
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or 512
        assembly = Assembly()
        spoken = False
        try:
            async with (
                self._room.taken(asked + (wanted if isinstance(wanted, int) and wanted > 0 else 512)),
                aclosing(self._events(route, body, param, terms)) as events,
            ):
                async for event in events:
                    delta = self._added(assembly, event)
                    if delta is not None and terms.emit is not None:
                        spoken = True
                        await terms.emit(delta)
            if assembly.finish is None:
                raise self._gone()
        except UpstreamUnavailable as error:
            if spoken:
                raise UpstreamBroken(error.message) from error
            raise
        return assembly.reply(call)

    def _added(self, assembly: Assembly, event: Mapping[str, Any]) -> Delta | None:
        try:
            return assembly.add(event)
        except ValueError as error:
            raise self._broken(f"sent a stream that is none: {error}") from error

    def _refuse(self, call: Chat | Completion) -> None:
        """Refuse what the server would pass over in silence."""
        if isinstance(call, Chat):
            if call.tools and not self._model.tools:
                raise Unsupported(f"{self._who}: the model {self._model.name} does not call tools", param="tools")
            for message in call.messages:
                for part in message.content if not isinstance(message.content, str) and message.content else ():
                    if part.get("type") != "text":
                        raise Unsupported(
                            f"{self._who} reads text only, and a message has a part of type {part.get('type')!r}",
                            param="messages",
                        )
            return
        for name, harmless in (("echo", (None, False)), ("suffix", (None, "")), ("best_of", (None, 1))):
            if call.params.get(name) not in harmless:
                raise Unsupported(f"{self._who} does not take `{name}`", param=name)

    async def _length(self, piece: str | Sequence[int], param: str) -> int:
        """Tokens of a text, or of what is tokens already. Raises Unsupported on those of another model."""
        if isinstance(piece, str):
            return await self.count(piece)
        if any(not 0 <= token < self._model.vocabulary for token in piece):
            raise Unsupported(
                f"{self._who}: the tokens of the model {self._model.name} are numbered from 0 to "
                f"{self._model.vocabulary - 1}",
                param=param,
            )
        return len(piece)

    # -- embeddings

    async def _embed(self, call: Embed, terms: Terms) -> Reply:
        """A call for each text, so that long ones wait for room and do not fail for want of it."""
        if call.params.get("dimensions") not in (None, self._model.width):
            raise Unsupported(
                f"{self._who}: the vectors of the model {self._model.name} have {self._model.width} dimensions",
                param="dimensions",
            )
        given = pieces(call.texts if call.given is None else call.given)
        found = await gather(self._embedded(call, piece, terms) for piece in given)
        return Reply(
            embeddings=tuple(reply.embeddings[0] for reply in found),
            usage=sum((reply.usage for reply in found), Usage()),
            model=self._model.name,
        )

    async def _embedded(self, call: Embed, piece: str | Sequence[int], terms: Terms) -> Reply:
        if isinstance(piece, str):
            single = Embed(identity=call.identity, texts=(piece,))
        else:
            single = Embed(identity=call.identity, texts=(), given=[piece])
        tokens = await self._length(piece, "input")
        if tokens > self._model.context:
            raise self._too_long(tokens, "input")
        body = body_of(single, self._model.name)
        async with (
            self._room.taken(tokens),
            self._asked("POST", "/v1/embeddings", body, "input", terms.deadline) as response,
        ):
            answer = self._whole(await self._read(response))
        try:
            return reply_of(answer, single)
        except ValueError as error:
            raise self._broken(f"sent embeddings that are none: {error}") from error

    # -- log-likelihood of a given text

    async def _score(self, call: Score, terms: Terms) -> Reply:
        if not call.continuation:
            return Reply(model=self._model.name)
        context, forced = await self._split(call.context, call.continuation)
        total = len(context) + len(forced)
        if total > self._model.context:
            raise self._too_long(total, "context")
        ids = _ids(forced)
        logprobs: list[TokenLogprob] = []
        cached: list[int] = []
        async with self._room.taken(total):
            for length in _stretches(forced):
                at = len(logprobs)
                logprobs += await self._measure([*context, *ids[:at]], ids[at : at + length], cached, terms)
        # What later stretches find in the cache was put there by this very call.
        usage = Usage(prompt_tokens=len(context), completion_tokens=len(ids), cached_tokens=cached[0] if cached else 0)
        return Reply(logprobs=tuple(logprobs), usage=usage, model=self._model.name)

    async def _split(self, context: str, continuation: str) -> tuple[list[int], list[_Token]]:
        """The tokens of the context and those of the continuation, as the model reads both in one.

        Where a token of the whole lies across the boundary, there is no such reading; then the two are read apart. A
        text after nothing is measured after the token that begins a text.
        """
        model = self._model
        before, whole = await asyncio.gather(self._pieces(context), self._pieces(context + continuation))
        if whole[: len(before)] == before:
            forced = whole[len(before) :]
        else:
            forced = await self._pieces(continuation)
            if b"".join(token.piece for token in forced) != continuation.encode():
                # Vocabularies that put a space before every text.
                raise Unsupported(
                    f"{self._who} reads the end of the context and the beginning of the continuation as one token; "
                    "let the continuation begin with the space or line break that the context ends with"
                )
        return [*(model.lead or (() if before else model.begin)), *_ids(before)], forced

    async def _measure(
        self, prompt: Sequence[int], ids: Sequence[int], cached: list[int], terms: Terms
    ) -> list[TokenLogprob]:
        """What each of the tokens would have been given after the prompt and those before it, by forcing them.

        Log-probabilities are taken before anything is forced, so forcing does not change them. A grammar of token
        literals forces many tokens at once, but not those that are no text of their own (see `_stretches`); they are
        forced by their bias, one at a time. Of those again, one that begins a character has no log-probability in the
        answer, as the server holds its text back; it is looked up in the whole distribution of its place. `cached`
        takes how many tokens of the prompt the server had already.
        """
        body: dict[str, Any] = {"prompt": list(prompt), "n_predict": len(ids), "temperature": 0, "n_probs": 1}
        body |= {"return_tokens": True, "cache_prompt": True, "stream": True, "return_progress": True}
        if len(ids) == 1:
            forcing: dict[str, Any] = {"logit_bias": [[ids[0], 1000]]}
        else:
            forcing = {"grammar": "root ::= " + " ".join(f"<[{number}]>" for number in ids)}
        found = await self._forced({**body, **forcing}, cached, terms)
        if len(ids) == 1 and not found:
            return [await self._in_distribution(body, ids[0], terms)]
        if [number for number, _ in found] != list(ids):
            raise self._broken("was made to say a given text and sent the log-probabilities of another")
        return [logprob for _, logprob in found]

    async def _in_distribution(self, body: Mapping[str, Any], wanted: int, terms: Terms) -> TokenLogprob:
        filler = (await self._tokens("."))[0]
        # Nearly always the first is enough; all of a vocabulary is 5 MB of JSON.
        for n_probs in (min(4096, self._model.vocabulary), self._model.vocabulary):
            forcing = {"n_probs": n_probs, "logit_bias": [[filler, 1000]]}
            async with aclosing(self._events("/completion", {**body, **forcing}, "context", terms)) as events:
                async for event in events:
                    for place in cast("list[object]", event.get("completion_probabilities") or []):
                        for item in cast("list[object]", mapping(place).get("top_logprobs") or []):
                            entry = mapping(item)
                            number = finite(entry.get("logprob"))
                            if entry.get("id") == wanted and number is not None:
                                return TokenLogprob(str(entry.get("token") or ""), number)
        raise self._broken("does not say how likely a token is that is part of a character")

    async def _forced(self, body: Mapping[str, Any], cached: list[int], terms: Terms) -> list[tuple[int, TokenLogprob]]:
        found: list[tuple[int, TokenLogprob]] = []
        async with aclosing(self._events("/completion", body, "context", terms)) as events:
            async for event in events:
                places = cast("list[object]", event.get("completion_probabilities") or [])
                tokens = logprobs_of({"content": places})
                if len(tokens) != len(places):
                    raise self._broken("sent log-probabilities that are no numbers")
                found += [(int(mapping(p).get("id", -1)), t) for p, t in zip(places, tokens, strict=True)]
                count = mapping(event.get("timings")).get("cache_n")
                if isinstance(count, int):
                    cached.append(count)
        return found

    # -- tokens

    async def _tokens(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        tokens = (await self._post("/tokenize", body)).get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(i, int) for i in cast("list[object]", tokens)):
            raise self._broken("sent tokens that are none")
        return cast("list[int]", tokens)

    async def _pieces(self, text: str) -> list[_Token]:
        if not text:
            return []
        body = {"content": text, "add_special": False, "parse_special": False, "with_pieces": True}
        answer = await self._post("/tokenize", body)
        try:
            items = [mapping(item) for item in cast("list[object]", answer["tokens"])]
            pieces = [item["piece"] for item in items]
            return [
                _Token(int(item["id"]), piece.encode() if isinstance(piece, str) else bytes(piece))
                for item, piece in zip(items, pieces, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken("sent tokens that are none") from error

    # -- HTTP

    async def _get(self, route: str) -> Mapping[str, Any]:
        async with self._asked("GET", route, None, "", None) as response:
            return self._whole(await self._read(response))

    async def _post(self, route: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        async with self._asked("POST", route, body, "", None) as response:
            return self._whole(await self._read(response))

    async def _events(
        self, route: str, body: Mapping[str, Any], param: str, terms: Terms
    ) -> AsyncGenerator[Mapping[str, Any]]:
        """The objects of a stream that say anything. Leaving before the end stops the work."""
        async with self._asked("POST", route, body, param, terms.deadline) as response:
            rest = b""
            try:
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    if len(rest) > EVENT_LIMIT:
                        raise self._broken(f"sent an event of more than {EVENT_LIMIT >> 20} MiB")
                    for line in lines:
                        field, _, data = line.partition(b":")
                        if field not in (b"data", b"error") or data.strip() in (b"", b"[DONE]"):
                            continue
                        event = self._whole(data)
                        if (refusal := embedded_error(event)) is not None:
                            raise self._refused(refusal.status, event, param)
                        if "prompt_progress" not in event:
                            yield event
            except aiohttp.ClientError as error:
                raise self._gone() from error

    @asynccontextmanager
    async def _asked(
        self, method: str, route: str, body: Mapping[str, Any] | None, param: str, deadline: float | None
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A response of status 200. While the child is being started again it is waited for, for a while."""
        if self._session is None:
            raise UpstreamUnavailable(f"{self._who} is not open yet", retry_after=1)
        loop = asyncio.get_running_loop()
        until = min(loop.time() + PATIENCE_SECONDS, deadline or float("inf"))
        data = None if body is None else orjson.dumps(body)
        headers = {"content-type": "application/json"}
        lost = 0
        while True:
            try:
                response = await self._session.request(method, route, data=data, headers=headers)
            except (aiohttp.ClientConnectorError, TimeoutError) as error:
                if loop.time() >= until:
                    raise self._unreached() from error
            except (aiohttp.ClientError, OSError) as error:
                # It ended as we asked. Once is chance; a second time, what we ask may be the reason.
                lost += 1
                if lost > 1 or loop.time() >= until:
                    raise self._gone() from error
            else:
                if response.status != 503 or loop.time() >= until:
                    break
                response.close()
            await asyncio.sleep(0.05)
        try:
            if response.status != 200:
                raise self._refused(response.status, json_object(await self._read(response)), param)
            yield response
        finally:
            response.close()

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        try:
            return await response.read()
        except aiohttp.ClientError as error:
            raise self._gone() from error

    def _whole(self, data: bytes) -> Mapping[str, Any]:
        body = json_object(data)
        if not body:
            raise self._broken("sent what is no JSON object")
        return body

    # -- errors

    @property
    def _who(self) -> str:
        return f'upstream "{self.name}"'

    def _broken(self, what: str) -> UpstreamBroken:
        return UpstreamBroken(f"{self._who} (the embedded model) {what}")

    def _too_long(self, tokens: object, param: str) -> UpstreamRejected:
        return UpstreamRejected(
            f"{self._who}: the prompt has {tokens} tokens, and the context of the embedded model has "
            f"{self._model.context} (upstreams.{self.name}.context)",
            param=param,
            code="context_length_exceeded",
        )

    def _refused(self, status: int, body: Mapping[str, Any], param: str) -> UpstreamError:
        error = mapping(body.get("error"))
        if error.get("type") == "exceed_context_size_error":
            return self._too_long(error.get("n_prompt_tokens"), param)
        refusal = refusal_of(status, body, {}, 0.0)
        if "context size has been exceeded" in refusal.message.lower():
            return UpstreamUnavailable(
                f"{self._who}: the calls that run at the same time need more than the embedded model's whole store of "
                f"{self._model.context * ROOM} tokens; ask for fewer at once",
                retry_after=1,
            )
        key_setting = f"upstreams.{self.name}.key_file" if self._key_file else KEY_VARIABLE
        return error_of(refusal, who=self._who, key_setting=key_setting, model=self._model.name)

    def _unreached(self) -> UpstreamError:
        if self._child is not None:
            trouble = self._child.trouble or "it does not take connections"
            return UpstreamUnavailable(
                f"{self._who}: the embedded model is being started again: {trouble}", retry_after=1
            )
        return UpstreamUnreachable(f"{self._who}: the process of the embedded model is not reached", retry_after=1)

    def _gone(self) -> UpstreamUnavailable:
        return UpstreamUnavailable(
            f"{self._who}: the process that runs the embedded model ended in the middle of an answer", retry_after=1
        )


# ---- values ----


@dataclass(frozen=True, slots=True)
class _Model:
    """What the child says of the model that it runs."""

    name: str = ""
    identity: str = ""
    context: int = CONTEXT
    slots: int = SLOTS
    vocabulary: int = 0
    width: int = 0
    """Numbers of an embedding."""
    tools: bool = False
    """Whether the chat template has a place for tools. Without one the server takes them and passes over them."""
    lead: tuple[int, ...] = ()
    """The token that is put in front of every text, for models that were trained so."""
    begin: tuple[int, ...] = ()
    """The token that begins a text, where it is not put in front of every one."""


@dataclass(frozen=True, slots=True)
class _Token:
    id: int
    piece: bytes


def _ids(tokens: Iterable[_Token]) -> list[int]:
    return [token.id for token in tokens]


def _stretches(tokens: Sequence[_Token]) -> list[int]:
    """How many tokens to force at a time: 1 for what a grammar cannot force, else as many as there are in a row.

    A grammar works on characters: it refuses a token that is a piece of one, and the character NUL.
    """
    lengths: list[int] = []
    going = False
    for token in tokens:
        if _forced_by_grammar(token.piece):
            if going:
                lengths[-1] += 1
            else:
                lengths.append(1)
            going = True
        else:
            lengths.append(1)
            going = False
    return lengths


def _forced_by_grammar(piece: bytes) -> bool:
    try:
        return "\0" not in piece.decode()
    except UnicodeDecodeError:
        return False


class _Room:
    """The child's slots and its store of keys and values, given out in the order of asking.

    More calls than fit in the store would all fail together, after all have been computed in part.
    """

    def __init__(self, slots: int, tokens: int) -> None:
        self._slots = slots
        self._tokens = tokens
        self._all = tokens
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @asynccontextmanager
    async def taken(self, tokens: int) -> AsyncGenerator[None]:
        tokens = min(tokens, self._all // ROOM)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, tokens))
        self._admit()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._slots += 1
                self._tokens += tokens
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            turn, tokens = self._waiting[0]
            if not turn.done():  # else it was cancelled while it waited
                if not self._slots or tokens > self._tokens:
                    return
                self._slots -= 1
                self._tokens -= tokens
                turn.set_result(None)
            self._waiting.popleft()
