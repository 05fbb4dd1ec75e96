"""An answer held against a client's schema: what fits, what does not, and schemas that are made to do harm."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.serving import Server, serving, upstream
from tests.timed import in_time, timed

from asmodel import structured
from asmodel.calls import Reply, ToolCall
from asmodel.errors import InvalidRequest
from asmodel.testing import ScriptedServer

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
LATEST = "https://json-schema.org/draft/2020-12/schema"


def wanted(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def misfit(schema: object, text: str) -> str | None:
    """Why the answer does not fit; None where it does."""
    read = structured.reader(wanted(schema))
    assert read is not None
    try:
        assert read(Reply(text=text)) == text
    except ValueError as error:
        return str(error)
    return None


# ---- what fits ----


def test_an_answer_that_fits_is_given_as_it_is() -> None:
    assert misfit(PERSON, ' {"name": "Ann",\n "age": 5} ') is None
    assert misfit({}, '"anything"') is None
    assert misfit(True, "7") is None


@pytest.mark.parametrize(
    ("schema", "text", "says"),
    [
        (PERSON, "Ann is five.", "not JSON: Expecting value at character 0"),
        (PERSON, '{"name": "Ann"', "not JSON"),
        (PERSON, "", "not JSON"),
        (PERSON, '{"name": "Ann"}', "'age' is a required property"),
        (PERSON, '{"name": "Ann", "age": "5"}', "age: '5' is not of type 'integer'"),
        (PERSON, '{"name": "Ann", "age": 5, "sex": "f"}', "'sex' was unexpected"),
        ({"items": PERSON}, '[{"name": 1, "age": 1}]', "0.name: 1 is not of type 'string'"),
        ({"type": "number"}, "NaN", "NaN is no number of JSON"),
        ({"type": "number"}, "-Infinity", "-Infinity is no number of JSON"),
        ({"type": "integer"}, "9" * 5000, "not JSON"),
        ({}, "[" * 100_000, "nested too deeply"),
        (False, "1", "False schema"),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, "1", "not of type 'null'"),
        ({"uniqueItems": True}, "[1, 1.0]", "not all different"),
    ],
)
def test_an_answer_that_does_not_fit_is_told_why(schema: object, text: str, says: str) -> None:
    told = misfit(schema, text)
    assert told is not None
    assert says in told
    assert len(told) < 400


def test_true_and_one_are_two_different_items() -> None:
    assert misfit({"uniqueItems": True}, "[1, true, {}, []]") is None


def test_a_schema_says_itself_which_draft_it_is_of() -> None:
    pair: dict[str, Any] = {"items": [{"type": "string"}, {"type": "number"}]}
    seven = pair | {"$schema": "http://json-schema.org/draft-07/schema#"}
    assert misfit(seven, '["a", 1]') is None
    assert "'b' is not of type 'number'" in (misfit(seven, '["a", "b"]') or "")
    with pytest.raises(InvalidRequest, match="not a JSON schema"):
        misfit(pair, "[]")


def test_json_object_is_any_object() -> None:
    read = structured.reader({"type": "json_object"})
    assert read is not None
    assert read(Reply(text='{"a": 1}')) == '{"a": 1}'
    with pytest.raises(ValueError, match="not of type 'object'"):
        read(Reply(text="[1]"))


@pytest.mark.parametrize("any_text", [None, {}, {"type": "text"}, {"type": None}, "json"])
def test_where_no_shape_is_asked_for_any_text_will_do(any_text: object) -> None:
    assert structured.reader(any_text) is None


@pytest.mark.parametrize(
    "reply",
    [
        Reply(text="", tool_calls=(ToolCall(id="c", name="f", arguments="{}"),), finish="tool_calls"),
        Reply(text="", refusal="I would rather not."),
        Reply(text='{"name": "A', finish="length"),
        Reply(text='{"name": "A', finish="content_filter"),
    ],
)
def test_calls_refusals_and_what_was_cut_off_are_answers_of_their_own(reply: Reply) -> None:
    read = structured.reader(wanted(PERSON))
    assert read is not None
    assert read(reply) == reply.text


# ---- formats that are none ----


@pytest.mark.parametrize(
    "format",
    [
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": []},
        wanted([]),
        wanted("object"),
        wanted({"type": "strin"}),
        wanted({"properties": {"a": 1}}),
        wanted({"required": "a"}),
        wanted({"$ref": "#/$defs/nowhere"}),
        wanted({"properties": {"a": {"$ref": "#/$defs/nowhere"}}}),
    ],
)
def test_a_format_that_is_none_is_refused_before_anything_is_asked(format: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        structured.reader(format)
    assert caught.value.param == "response_format"


def test_nothing_is_ever_fetched_for_a_reference() -> None:
    with ScriptedServer() as elsewhere:
        address = f"{elsewhere.address}/schema.json"
        for schema in (
            {"$ref": address},
            {"properties": {"a": {"$ref": address}}},
            {"$id": address, "properties": {"a": {"$ref": "other.json"}}},
            {"$dynamicRef": address},
            {"$schema": address, "$ref": address},
        ):
            with pytest.raises(InvalidRequest, match="leads nowhere"):
                misfit(schema, '{"a": 1}')
        assert misfit({"$schema": address, "type": "object"}, "{}") is None
        assert elsewhere.requests == []


def test_a_reference_to_a_part_that_names_itself_is_followed() -> None:
    schema = {"$defs": {"n": {"$id": "urn:n", "type": "number"}}, "properties": {"a": {"$ref": "urn:n"}}}
    assert misfit(schema, '{"a": 1}') is None
    assert misfit(schema, '{"a": "x"}') is not None
    inside = {"$defs": {"n": {"$id": "urn:n", "$ref": "#/$defs/m", "$defs": {"m": {"type": "number"}}}}}
    assert misfit(inside | {"properties": {"a": {"$ref": "urn:n"}}}, '{"a": "x"}') is not None


# ---- schemas that are made to do harm ----

HOSTILE = "(a+)+$"
EVIL = "a" * 60 + "!"


@timed
@pytest.mark.parametrize(
    ("schema", "answer"),
    [
        ({"pattern": HOSTILE}, EVIL),
        ({"$schema": LATEST, "pattern": HOSTILE}, EVIL),
        ({"properties": {"a": {"$schema": LATEST, "pattern": HOSTILE}}}, {"a": EVIL}),
        (
            {
                "$schema": LATEST,
                "anyOf": [{"properties": {"a": {"$ref": "#"}}, "type": "object"}, {"pattern": HOSTILE}],
            },
            EVIL,
        ),
        ({"enum": [{"$schema": LATEST, "pattern": HOSTILE}, EVIL], "allOf": [{"$ref": "#/enum/0"}]}, EVIL),
        ({"patternProperties": {HOSTILE: True}}, {EVIL: 1}),
        ({"patternProperties": {HOSTILE: True}, "additionalProperties": False}, {EVIL: 1}),
        ({"allOf": [{"patternProperties": {HOSTILE: True}}], "unevaluatedProperties": False}, {EVIL: 1}),
        ({"propertyNames": {"pattern": HOSTILE}}, {EVIL: 1}),
        ({"pattern": r"^\p{Lu}(?<name>x)$"}, "of JavaScript's kind"),
        ({"pattern": "("}, "no pattern at all"),
    ],
)
def test_patterns_are_never_run_wherever_they_stand(schema: object, answer: object) -> None:
    began = time.monotonic()
    assert misfit(schema, json.dumps(answer)) is None
    in_time(time.monotonic() - began, 2)


def test_names_that_a_pattern_may_stand_for_are_no_misfits_and_others_are() -> None:
    closed = {"properties": {"a": {"type": "number"}}, "additionalProperties": False}
    assert misfit(closed, '{"b": 1}') is not None
    assert misfit({"not": {"patternProperties": {"x": False}, "required": ["y"]}, **closed}, '{"b": 1}') is not None
    assert misfit({**closed, "patternProperties": {"^b": True}}, '{"a": "x", "b": 1}') is not None


def test_a_schema_that_takes_for_ever_is_given_up() -> None:
    levels: dict[str, Any] = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**levels, "d40": {"type": "number"}}}
    began = time.monotonic()
    with pytest.raises(InvalidRequest, match=r"takes more than 0\.5 s"):
        misfit(schema, '"x"')
    assert time.monotonic() - began < 5
    assert misfit(PERSON, '{"name": "Ann", "age": 5}') is None


def test_a_schema_that_refers_to_itself_ends() -> None:
    assert "without end" in (misfit({"$ref": "#"}, "1") or "")
    tree = {"properties": {"left": {"$ref": "#"}}, "additionalProperties": False}
    assert misfit(tree, '{"left": {"left": {}}}') is None
    assert misfit(tree, '{"left": {"right": {}}}') is not None


def test_a_long_list_of_different_items_is_seen_to_be_that_in_no_time() -> None:
    began = time.monotonic()
    assert misfit({"uniqueItems": True}, json.dumps([{"n": n} for n in range(20_000)])) is None
    assert time.monotonic() - began < 5


def test_a_schema_that_is_too_large_is_refused_and_one_that_is_as_large_as_can_be_is_read() -> None:
    def of(count: int) -> dict[str, Any]:
        return {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(count)}}

    assert misfit(of(5000), "{}") is None
    with pytest.raises(InvalidRequest, match="more than 12000 values"):
        misfit(of(20_000), "{}")


# ---- as the server does it ----

PROGRAMS = '''
"""Programs that promise more than they keep."""

from asmodel import Answer, Run, program, step


@step(temperature=0)
def ask(question: str) -> str:
    return question


@program("careless", supports=["response_format"])
async def careless(run: Run) -> str:
    """Does not reply with a step, so nothing but the server holds its answer to the shape."""
    return await run(ask, run.question)


@program("limited", supports=["response_format"])
async def limited(run: Run) -> str:
    """Has half an answer when its limit is reached."""
    run.best('{"name": "A')
    await run(ask, run.question)
    return await run.reply(ask, "again " + run.question)


@program("strange")
async def strange(run: Run) -> Answer:
    """Returns what JSON has no words for."""
    return Answer(text="\\ud800") if run.question == "text" else Answer(text="x", data={"a": object()})
'''


@pytest.fixture(scope="module")
def answers() -> dict[str, list[str]]:
    return {}


@pytest.fixture(scope="module")
def up(answers: dict[str, list[str]]) -> Iterator[ScriptedServer]:
    def answer(body: dict[str, Any]) -> str:
        said = answers[body["messages"][0]["content"]]
        return said.pop(0) if len(said) > 1 else said[0]

    with ScriptedServer(answer) as made:
        yield made


@pytest.fixture(scope="module")
def server(up: ScriptedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("structured")
    (folder / "programs").mkdir()
    (folder / "programs" / "loose.py").write_text(PROGRAMS)
    with serving(folder, 'program_folders = ["programs"]\n' + upstream(up.base_url)) as made:
        yield made


def body(model: str, question: str, **more: Any) -> dict[str, Any]:
    asked = {"model": model, "messages": [{"role": "user", "content": question}], "response_format": wanted(PERSON)}
    return asked | more


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_leaves_only_when_it_fits_and_the_one_that_fits_is_kept(
    stream: bool, server: Server, up: ScriptedServer, answers: dict[str, list[str]]
) -> None:
    question = f"who {stream}"
    answers[question] = ['{"name": "Ann"}', '{"name": "Ann", "age": 5}']
    for calls in (2, 2):
        answer = server.chat(body("plain", question, stream=stream))
        assert answer.status == 200
        assert b"age" in answer.body
        assert b'{\\"name\\": \\"Ann\\"}' not in answer.body
        assert len([r for r in up.requests if r.body["messages"][0]["content"] == question]) == calls


def test_a_schema_that_is_none_costs_nothing(server: Server, up: ScriptedServer) -> None:
    asked = len(up.requests)
    answer = server.chat(body("plain", "never", response_format=wanted({"$ref": "http://127.0.0.1:9/x"})))
    assert (answer.status, answer.error["param"]) == (400, "response_format")
    assert len(up.requests) == asked


def test_an_upstream_that_is_passed_through_judges_a_schema_itself(
    server: Server, up: ScriptedServer, answers: dict[str, list[str]]
) -> None:
    odd = wanted({"$ref": "http://127.0.0.1:9/x"})
    answers["odd"] = ["no JSON at all"]
    answer = server.chat(body("default", "odd", response_format=odd))
    assert answer.json["choices"][0]["message"]["content"] == "no JSON at all"
    assert up.requests[-1].body["response_format"] == odd


def test_a_program_that_does_not_keep_to_the_shape_is_an_error_that_names_it(
    server: Server, answers: dict[str, list[str]]
) -> None:
    answers["careless"] = ["five"]
    answer = server.chat(body("careless", "careless"))
    assert (answer.status, answer.error["code"]) == (500, "answer_unfit")
    assert 'program "careless"' in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    answers["careful"] = ['{"name": "Ann", "age": 5}']
    assert server.chat(body("careless", "careful")).status == 200


def test_the_best_answer_at_a_limit_says_that_it_is_cut_off(server: Server, answers: dict[str, list[str]]) -> None:
    answers["limit"] = ["x"]
    answer = server.chat(body("limited", "limit", asmodel={"limits": {"calls": 1}}))
    assert answer.status == 200, answer.body
    choice = answer.json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", '{"name": "A')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", ["text", "data"])
def test_what_json_cannot_carry_is_an_error_of_the_program(question: str, stream: bool, server: Server) -> None:
    asked = {"model": "strange", "messages": [{"role": "user", "content": question}], "stream": stream}
    answer = server.chat(asked)
    assert (answer.status, answer.error["code"]) == (500, "program_error")
    assert "JSON cannot carry" in answer.error["message"]
