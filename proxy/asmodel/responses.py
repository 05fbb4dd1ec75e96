"""`/v1/responses`: a request answered as a chat completion would be, shaped as a response; and those that are kept.

What is kept is kept by the holder of the key that it came with, apart from the step cache, until it is deleted or too
old: see `response_store`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from asmodel import response_events, response_wire, wire
from asmodel.access import Access
from asmodel.admission import Held, Room
from asmodel.answering import Answering
from asmodel.calls import Delta
from asmodel.chat import Asking, Stream, asked_of, receipt, tokens
from asmodel.errors import AsmodelError, InvalidRequest, Unsupported
from asmodel.exchange import Exchange
from asmodel.models import Model
from asmodel.response_events import Draft
from asmodel.response_store import Kept, ResponseStore
from asmodel.response_wire import ResponseRequest
from asmodel.service import Asked as Question
from asmodel.service import Job, Outcome, Service
from asmodel.wire import Json

LISTED = 20
"""Items of a page, where no `limit` is asked for."""
MOST_LISTED = 100


class PreviousResponseNotFound(InvalidRequest):
    """A response that is to be gone on from is not kept here, or not for this caller."""

    status = 404
    code: str | None = "previous_response_not_found"


class ResponseNotFound(InvalidRequest):
    """No such response is kept here, or not for this caller."""

    status = 404
    code: str | None = "response_not_found"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for a response: as it came, and as the chat completion that it asks for."""

    response: ResponseRequest
    chat: wire.ChatRequest
    items: Sequence[Json]
    """The input, with items that were only named in their places."""
    store: ResponseStore | None
    """Where the response is to be kept; None where it is not."""
    scope: str
    held: Held
    """The room that it takes for what it goes on from; to be let go when it is over."""

    @property
    def model(self) -> str:
        return self.response.model

    @property
    def n(self) -> int:
        return 1

    @property
    def stream(self) -> bool | None:
        return self.response.stream

    @property
    def asmodel(self) -> wire.Extension:
        return self.response.asmodel


class Responses(Asking[Asked]):
    """`POST /v1/responses`. Without a `store` nothing is kept."""

    path = "/v1/responses"

    def __init__(
        self,
        service: Service,
        access: Access,
        *,
        store: ResponseStore | None,
        room: Room,
        body_bytes: int = 20_000_000,
        messages: int = 2048,
        n: int = 16,
        progress: bool = True,
        grace: float = 60.0,
        keep: float = 600.0,
    ) -> None:
        super().__init__(
            service,
            access,
            body_bytes=body_bytes,
            messages=messages,
            n=n,
            progress=progress,
            grace=grace,
            keep=keep,
        )
        self._store = store
        self._room = room

    async def _read(self, exchange: Exchange, body: bytes) -> Asked:
        request = response_wire.read(body, items=self._messages)
        scope = exchange.caller.scope
        held = Held(self._room)
        try:
            before = await self._before(request.previous_response_id, scope, held)
            items = await self._resolved(request.items, before, scope, held)
            response_wire.too_many(len(before) + len(items), self._messages)
            return Asked(
                response=request,
                chat=response_wire.chat_of(request, [*before, *items]),
                items=items,
                store=self._store if request.store is not False else None,
                scope=scope,
                held=held,
            )
        except BaseException:
            held.let_go()
            raise

    async def _answer(self, exchange: Exchange, request: Asked, body: bytes) -> str:
        try:
            return await super()._answer(exchange, request, body)
        except AsmodelError as error:
            told = response_wire.renamed(error)
            if told is error:
                raise
            raise told from error
        finally:
            request.held.let_go()

    def _asked(self, exchange: Exchange, request: Asked, model: Model, body: bytes) -> Question:
        asked = asked_of(exchange, request.chat, model, body)
        return replace(asked, translated=True, ignored=(*asked.ignored, *request.response.without_effect))

    async def _body(
        self, exchange: Exchange, request: Asked, job: Job, id: str, created: int, outcomes: list[Outcome]
    ) -> Json:
        draft = drafted(request, id, created)
        (outcome,) = outcomes
        draft.end(outcome.answer, outcome.reply)
        return await finished(request, draft, exchange, job, outcome)

    def _chunks(self, exchange: Exchange, job: Job, id: str, created: int) -> wire.Chunks:
        # Of what `_stream` writes over, and of an upstream's own stream, which is never passed on here.
        return wire.Chunks(id, created, exchange.model, include_usage=False)

    def _stream(self, exchange: Exchange, request: Asked, answering: Answering, *, progress: bool) -> Stream:
        chunks = self._chunks(exchange, answering.job, answering.id, answering.created)
        return _Events(exchange, answering, chunks, request, progress=progress)

    async def _before(self, id: str | None, scope: str, held: Held) -> list[Json]:
        """The items of the conversation that a response ended.

        Raises PreviousResponseNotFound, StoreUnavailable, Overloaded.
        """
        if id is None:
            return []
        if self._store is None:
            raise PreviousResponseNotFound(
                "this server keeps no responses ([store] kind is off); send the whole conversation as `input`",
                param="previous_response_id",
            )
        chain = await self._store.chain(scope, id, most=self._messages, most_bytes=self._body_bytes)
        if not chain or chain[0].previous is not None:
            missing = "it" if not chain else "one that it goes on from"
            raise PreviousResponseNotFound(
                f"there is no response {id[:80]} to go on from: {missing} was never kept for you, was deleted, or is "
                "too old",
                param="previous_response_id",
            )
        return conversation(chain, held)

    async def _resolved(self, items: Sequence[Json], before: Sequence[Json], scope: str, held: Held) -> list[Json]:
        """The items, with those that are only named put in their places.

        Raises InvalidRequest, StoreUnavailable, Overloaded.
        """
        if all(item["type"] != "item_reference" for item in items):
            return list(items)
        known = {item["id"]: item for item in before}
        resolved: list[Json] = []
        for place, item in enumerate(items):
            if item["type"] == "item_reference":
                owner = response_wire.owner_of(item["id"])
                if item["id"] not in known and owner is not None and self._store is not None:
                    kept = await self._store.get(scope, owner)
                    known |= {i["id"]: i for i in ([] if kept is None else conversation([kept], held))}
                if item["id"] not in known:
                    raise ResponseNotFound(
                        f"`input.{place}.id`: no such item is kept here; send the item itself",
                        param=f"input.{place}.id",
                    )
                item = known[item["id"]]
            resolved.append(item)
        return resolved


def conversation(chain: Sequence[Kept], held: Held) -> list[Json]:
    """The items of responses that go on from one another: of each what was asked, and what was answered.

    Raises Overloaded where there is no room for them.
    """
    held.add(sum(len(kept.body) for kept in chain))
    items: list[Json] = []
    for kept in chain:
        body = orjson.loads(kept.body)
        items += body["input"]
        items += body["response"]["output"]
    return items


def drafted(request: Asked, id: str, created: int) -> Draft:
    """A response to begin with; `id` is that of the chat completion that it is made of."""
    name = response_wire.response_id(id)
    return Draft(response_events.head(request.response, name, created, store=request.store is not None))


async def finished(request: Asked, draft: Draft, exchange: Exchange, job: Job, outcome: Outcome) -> Json:
    """The whole response, which is kept by now where it is to be."""
    usage = response_events.usage_of(tokens(job, [outcome]))
    told = receipt_of(exchange, job, [outcome])
    response = draft.response(outcome.answer, usage, at=int(time.time()), receipt=told)
    if request.store is not None:
        kept = {"input": response_wire.kept(request.items, response["id"]), "response": response}
        previous = request.response.previous_response_id
        if not await request.store.put(request.scope, response["id"], orjson.dumps(kept), previous=previous):
            response["store"] = False  # Nobody is to go on from what is not there.
    return response


def receipt_of(exchange: Exchange, job: Job, outcomes: list[Outcome]) -> Json | None:
    """The receipt of a chat completion, with the names that parameters have here."""
    told = receipt(exchange, job, outcomes)
    if told is not None:
        told["ignored"] = sorted(response_wire.our_name(name) for name in told["ignored"])
    return told


class _Events(Stream):
    """One streamed response, as the API's events."""

    def __init__(
        self, exchange: Exchange, answering: Answering, chunks: wire.Chunks, request: Asked, *, progress: bool
    ) -> None:
        super().__init__(exchange, answering, chunks, progress=progress)
        self._request = request
        self._draft = drafted(request, answering.id, answering.created)
        self._rest = b""
        """Events of the answer's end, which wait until it is kept."""

    def _roles(self) -> bytes:
        if self._began:
            return b""
        self._began = True
        return self._draft.begin()

    def _delta(self, choice: int, body: Json, delta: Delta) -> bytes:
        return self._draft.add(delta)

    def _line(self, choice: int, line: str) -> bytes:
        return self._draft.line(line)

    def _failure(self, error: AsmodelError) -> bytes:
        return self._rest + self._draft.failed(response_wire.renamed(error), receipt_of(self._exchange, self._job, []))

    async def _ending(self, outcomes: list[Outcome]) -> bytes:
        (outcome,) = outcomes
        self._rest = self._draft.end(outcome.answer, outcome.reply)
        response = await finished(self._request, self._draft, self._exchange, self._job, outcome)
        return self._rest + self._draft.closing(response)


class KeptRoute(Route):
    """A route under the id of a response, which is no word for something to be done, as `compact` is elsewhere."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        if match is Match.PARTIAL and scope["method"] == "POST":
            return Match.NONE, {}
        return match, found


class KeptResponses:
    """`GET` and `DELETE /v1/responses/{id}`, and `GET /v1/responses/{id}/input_items`."""

    def __init__(self, access: Access, store: ResponseStore | None, room: Room, *, most: int, most_bytes: int) -> None:
        self._access = access
        self._store = store
        self._room = room
        self._most = most
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        outcome = "ok"
        held = Held(self._room)
        try:
            exchange.admit(self._access)
            asked = parse_qs(scope.get("query_string", b"").decode("latin-1"))
            body = await self._found(exchange, scope["path_params"]["id"], asked, held)
        except AsmodelError as error:
            outcome = error.code or "error"
            await exchange.refuse(error)
        else:
            await exchange.respond(200, body)
        finally:
            held.let_go()
            exchange.log(outcome)

    async def _found(self, exchange: Exchange, id: str, asked: Mapping[str, list[str]], held: Held) -> Json:
        if self._store is None:
            raise ResponseNotFound("this server keeps no responses ([store] kind is off)")
        scope = exchange.caller.scope
        missing = ResponseNotFound(
            f"there is no response {id[:80]}: it was never kept for you, was deleted, or is too old"
        )
        if exchange.method == "DELETE":
            if not await self._store.delete(scope, id):
                raise missing
            return {"id": id, "object": "response", "deleted": True}
        if exchange.path.endswith("/input_items"):
            chain = await self._store.chain(scope, id, most=self._most, most_bytes=self._most_bytes)
            if not chain:
                raise missing
            before = conversation(chain[:-1], held)
            held.add(len(chain[-1].body))
            own: list[Json] = orjson.loads(chain[-1].body)["input"]
            return page([*before, *own], asked)
        streamed = _one(asked, "stream", "false").lower()
        if streamed == "true":
            raise Unsupported("`stream`: what is kept is whole; leave it out", param="stream")
        if streamed != "false":
            raise InvalidRequest("`stream` should be true or false", param="stream", code="invalid_value")
        kept = await self._store.get(scope, id)
        if kept is None:
            raise missing
        held.add(len(kept.body))
        response: Json = orjson.loads(kept.body)["response"]
        return response


def _one(asked: Mapping[str, list[str]], name: str, otherwise: str) -> str:
    """A parameter of the query. Raises InvalidRequest where it is there several times."""
    given = asked.get(name, [otherwise])
    if len(given) != 1:
        raise InvalidRequest(f"`{name}` should be there once, not {len(given)} times", param=name, code="invalid_value")
    return given[0]


def page(items: Sequence[Json], asked: Mapping[str, list[str]]) -> Json:
    """A page of a list, newest first unless `order` is asc. Raises InvalidRequest."""
    order, limit = _one(asked, "order", "desc"), _one(asked, "limit", str(LISTED))
    after = _one(asked, "after", "")
    if order not in ("asc", "desc"):
        raise InvalidRequest("`order` should be asc or desc", param="order", code="invalid_value")
    if not limit.isascii() or not limit.isdigit() or len(limit) > 9 or not 1 <= int(limit) <= MOST_LISTED:
        raise InvalidRequest(f"`limit` should be 1 to {MOST_LISTED}", param="limit", code="invalid_value")
    listed = list(items) if order == "asc" else list(reversed(items))
    if after:
        places = [place for place, item in enumerate(listed) if item["id"] == after]
        if not places:
            raise InvalidRequest("`after` should be the id of an item of the list", param="after", code="invalid_value")
        listed = listed[places[0] + 1 :]
    shown: list[dict[str, Any]] = listed[: int(limit)]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(listed) > len(shown),
    }
