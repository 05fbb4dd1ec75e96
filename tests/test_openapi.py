"""`GET /openapi.json` says what the server does: its routes, its bodies, its headers and its errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.serving import Answered, Server, eventually, serving, upstream

from asmodel import openapi, reference
from asmodel.app import create_app
from asmodel.settings import Settings
from asmodel.testing import Fault, Received, ScriptedServer


@pytest.fixture(scope="module")
def up() -> Iterator[ScriptedServer]:
    def fault(received: Received) -> Fault | None:
        return Fault(status=429, headers={"retry-after": "1"}) if "too often" in json.dumps(received.body) else None

    with ScriptedServer(faults=fault) as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = upstream(up.base_url, retries=0) + '[keys]\nann = "the-key-of-ann"\n'
    with serving(tmp_path_factory.mktemp("openapi"), settings) as made:
        yield made


ANN = {"authorization": "Bearer the-key-of-ann"}


@pytest.fixture(scope="module")
def contract(server: Server) -> dict[str, Any]:
    answer = server.ask("GET", "/openapi.json", None, ANN)
    assert answer.status == 200
    return dict(answer.json)


def valid(contract: Mapping[str, Any], schema: Mapping[str, Any], body: object) -> None:
    Draft202012Validator({**schema, "components": contract["components"]}).validate(body)  # pyright: ignore[reportUnknownMemberType]


def described(contract: Mapping[str, Any], method: str, path: str, answer: Answered) -> None:
    """The answer is one that the document has: its status, its type, its headers, its body."""
    told = contract["paths"][path][method.lower()]["responses"]
    assert str(answer.status) in told, (answer.status, answer.body)
    response = told[str(answer.status)]
    kind = answer.headers["content-type"].partition(";")[0]
    assert kind in response["content"]
    for name, header in response["headers"].items():
        if name in answer.headers:
            numeric = header["schema"]["type"] in ("integer", "number")
            valid(contract, header["schema"], json.loads(answer.headers[name]) if numeric else answer.headers[name])
    media = response["content"][kind]
    if kind == "application/json":
        valid(contract, media["schema"], answer.json)
    elif kind == "text/event-stream":
        lines = answer.body.removesuffix(b"\n\n").split(b"\n\n")
        if path != "/v1/responses":
            assert lines.pop() == b"data: [DONE]"
        for line in lines:
            if not line.startswith(b":"):
                line = line[line.index(b"data: ") :]
                valid(contract, media["x-event"], json.loads(line.removeprefix(b"data: ")))


def test_every_route_of_the_server_is_in_the_document_and_no_other() -> None:
    routes = create_app(Settings()).routes
    served = {f"{m} {r.path.replace(':path', '')}" for r in routes for m in (r.methods or ()) if m != "HEAD"}
    assert served == reference.ROUTES.keys()
    served -= reference.OF_THE_PAGE
    assert served == {operation.name for operation in openapi.OPERATIONS}
    paths = openapi.document(version="1")["paths"]
    assert served == {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}


def test_every_reference_leads_somewhere(contract: dict[str, Any]) -> None:
    text = json.dumps(contract)
    names = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= contract["components"]["schemas"].keys()
    for schema in contract["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    identities = [op["operationId"] for methods in contract["paths"].values() for op in methods.values()]
    assert len(identities) == len(set(identities))


def test_a_key_is_wanted_in_the_document_where_it_is_by_the_server(server: Server, contract: dict[str, Any]) -> None:
    assert contract["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, methods in contract["paths"].items():
        for method, operation in methods.items():
            body = {"model": "default"} if method == "post" else None
            status = server.ask(method.upper(), path.replace("{id}", "plain"), body).status
            assert (status == 401) == ("security" in operation), (path, status)
            assert ("401" in operation["responses"]) == ("security" in operation)
    keyless = openapi.document(version="1")
    assert "securitySchemes" not in keyless["components"]
    assert "403" in keyless["paths"]["/v1/models"]["get"]["responses"]


def test_the_bounds_of_the_settings_are_in_it(contract: dict[str, Any]) -> None:
    schemas = contract["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["messages"]["maxItems"] == 2048
    assert schemas["ChatRequest"]["properties"]["n"]["anyOf"][0]["maximum"] == 16
    bounds = [branch.get("maxItems") for branch in schemas["CompletionRequest"]["properties"]["prompt"]["anyOf"]]
    assert bounds == [None, 2048, None, 2048]
    assert {"plain", "self-consistency", "default"} <= set(schemas["ChatRequest"]["properties"]["model"]["examples"])


def test_what_the_server_answers_is_what_the_document_says(server: Server, contract: dict[str, Any]) -> None:
    eventually("it is ready", lambda: server.ask("GET", "/readyz").status == 200)
    hello = {"messages": [{"role": "user", "content": "hello"}]}
    often = {"messages": [{"role": "user", "content": "too often"}]}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    posts: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": "plain", **hello}),
        ("/v1/chat/completions", {"model": "plain", **hello, **usage}),
        ("/v1/chat/completions", {"model": "self-consistency", **hello, "n": 2, "asmodel": {"params": {"samples": 2}}}),
        ("/v1/chat/completions", {"model": "default", **hello}),
        ("/v1/chat/completions", {"model": "default", **hello, **usage, "logprobs": True}),
        ("/v1/chat/completions", {"model": "default", **hello, "asmodel": {"cache": "on"}}),
        ("/v1/chat/completions", {"model": "plain", **often}),
        ("/v1/chat/completions", {"model": "plain", **hello, "temperature": 9}),
        ("/v1/chat/completions", {"model": "nobody", **hello}),
        ("/v1/chat/completions", {"model": "plain", **hello, "asmodel": {"cache": "only"}, "seed": 7}),
        ("/v1/responses", {"model": "plain", "input": "hello"}),
        ("/v1/responses", {"model": "default", "input": "hello", "stream": True}),
        ("/v1/responses", {"model": "plain", "input": "hello", "stream": True}),
        ("/v1/responses", {"model": "plain", "input": "hello", "background": True}),
        ("/v1/responses", {"model": "plain", "input": "hello", "previous_response_id": "resp_0"}),
        ("/v1/completions", {"model": "default", "prompt": ["a", "b"], "logprobs": 1}),
        ("/v1/completions", {"model": "default", "prompt": "a", **usage}),
        ("/v1/completions", {"model": "default", "prompt": "a", **usage, "asmodel": {"cache": "on"}}),
        ("/v1/completions", {"model": "plain", "prompt": "a"}),
        ("/v1/embeddings", {"model": "default", "input": "a"}),
        ("/v1/embeddings", {"model": "default", "input": "a", "encoding_format": "base64", "asmodel": {"cache": "on"}}),
        ("/v1/embeddings", {"model": "default"}),
    ]
    for path, body in posts:
        described(contract, "POST", path, server.ask("POST", path, body, ANN))
    id = server.ask("POST", "/v1/responses", {"model": "plain", "input": "kept"}, ANN).json["id"]
    for method, more in (("GET", ""), ("GET", "/input_items"), ("DELETE", ""), ("GET", "")):
        answer = server.ask(method, f"/v1/responses/{id}{more}", None, ANN)
        described(contract, method, f"/v1/responses/{{id}}{more}", answer)
    for path in contract["paths"]:
        if "get" in contract["paths"][path]:
            for name in ("plain", "default", "nobody"):
                described(contract, "GET", path, server.ask("GET", path.replace("{id}", name), None, ANN))


def test_a_request_that_the_document_forbids_is_refused(server: Server, contract: dict[str, Any]) -> None:
    schemas = contract["components"]["schemas"]
    wrong: list[dict[str, Any]] = [
        {"model": "plain"},
        {"model": "", "messages": [{"role": "user"}]},
        {"model": "plain", "messages": [{"role": "nobody", "content": "x"}]},
        {"model": "plain", "messages": [{"role": "user", "content": "x"}], "n": 17},
        {"model": "plain", "messages": [{"role": "user", "content": "x"}], "asmodel": {"what": 1}},
    ]
    check = Draft202012Validator({**schemas["ChatRequest"], "components": contract["components"]})
    for body in wrong:
        assert not check.is_valid(body)  # pyright: ignore[reportUnknownMemberType]
        assert server.ask("POST", "/v1/chat/completions", body, ANN).status == 400
