"""The key of a call holds all that its answer depends on; a stored reply comes back as it was, or not at all."""

from __future__ import annotations

import json
import math
import pickle
import string
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asmodel.calls import (
    Call,
    Chat,
    Completion,
    Embed,
    Message,
    NotJSON,
    Origin,
    Reply,
    Score,
    TokenLogprob,
    ToolCall,
    Usage,
    body,
    canonical,
    describe,
    drawn,
    key,
)

CHAT = Chat(identity="a", messages=(Message("user", "hello"),), params={"temperature": 0.5, "stop": ["x"]}, draw="0/0")
COMPLETION = Completion(identity="a", prompt="hello", params={"temperature": 0.5}, draw="0/0")
SCORE = Score(identity="a", context="hello", continuation=" world")
EMBED = Embed(identity="a", texts=("hello",), params={"dimensions": 8})

# Every field of every kind of call, and other values that it may have. A field that is missing here fails a test: ask
# whether another value could change the answer. If so it belongs in the call and here; if not, in Terms.
OTHERS: dict[type[Any], dict[str, list[Any]]] = {
    Chat: {
        "identity": ["b"],
        "messages": [(), (Message("system", "hello"),), (Message("user", "hello"), Message("user", "hello"))],
        "params": [{}, {"temperature": 0.5}, {"temperature": None, "stop": ["x"]}, {"temperature": 0.5, "stop": "x"}],
        "schema": [{}, {"type": "object"}],
        "tools": [({"type": "function", "function": {"name": "f"}},)],
        "draw": [None, "0/1"],
    },
    Completion: {
        "identity": ["b"],
        "prompt": ["hello "],
        "params": [{}, {"temperature": 1}],
        "draw": [None, "0/1"],
        "given": ["hello", ["hello"], [1], [[1]]],
    },
    Score: {"identity": ["b"], "context": ["hell"], "continuation": ["world", " world "]},
    Embed: {
        "identity": ["b"],
        "texts": [("hello", ""), ("hel", "lo")],
        "params": [{}, {"dimensions": 9}],
        "given": ["hello", [1], [[1]]],
    },
}

names = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


def chat(**params: Any) -> str:
    return key(Chat(identity="a", messages=(), params=params))


@pytest.mark.parametrize("call", [CHAT, COMPLETION, SCORE, EMBED], ids=lambda call: call.kind)
def test_every_field_of_a_call_is_in_its_key(call: Call) -> None:
    others = OTHERS[type(call)]
    assert {field.name for field in fields(call) if field.init} == set(others), (
        "say in OTHERS how a new field moves the key"
    )
    keys = [key(call)]
    for name, alternatives in others.items():
        keys += [key(replace(call, **{name: other})) for other in alternatives]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("call", [CHAT, COMPLETION, SCORE, EMBED], ids=lambda call: call.kind)
def test_every_field_of_a_call_is_described(call: Call) -> None:
    every = {"kind", *(field.name for field in fields(call) if field.init)}
    # What only a request that is passed through has is there only where it has it: it moves no other key.
    assert set(describe(call)) == every - {"given"}
    if isinstance(call, (Completion, Embed)):
        assert set(describe(replace(call, given="x"))) == every


def test_calls_of_different_kinds_share_no_key() -> None:
    assert len({key(Score(identity="a", context="", continuation="")), key(Completion(identity="a", prompt=""))}) == 2
    assert len({key(Chat(identity="a", messages=())), key(Embed(identity="a", texts=()))}) == 2


def test_a_key_is_64_hex_digits_and_the_same_in_every_process() -> None:
    assert key(SCORE) == "2e9b54496785e418b48b9e1af6590f668a0c3fa2745f6ffd3d1acec686e7c8b6"


def test_another_scope_is_another_key() -> None:
    assert len({key(CHAT), key(CHAT, "team-a"), key(CHAT, "team-b")}) == 3


def test_an_absent_parameter_is_neither_null_nor_its_default() -> None:
    assert len({chat(), chat(temperature=None), chat(temperature=1), chat(temperature=0)}) == 4


def test_one_is_one_however_it_is_written_but_it_is_not_true_nor_a_text() -> None:
    assert chat(seed=1) == chat(seed=1.0)
    assert len({chat(seed=1), chat(seed=True), chat(seed="1"), chat(seed=[1])}) == 4
    assert chat(seed=0) == chat(seed=-0.0)
    assert len({chat(seed=0), chat(seed=False), chat(seed=None), chat(seed="")}) == 4


def test_large_integers_are_told_apart_from_each_other_and_from_what_resembles_them() -> None:
    large = [2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63), -(2**63) - 1, 10**400]
    keys = {chat(seed=n) for n in large} | {chat(seed=str(2**64)), chat(seed={"\x00int": str(2**64)})}
    assert len(keys) == len(large) + 2


def test_the_order_of_messages_and_of_tools_is_in_the_key_and_that_of_names_is_not() -> None:
    a, b = Message("user", "a"), Message("user", "b")
    assert key(replace(CHAT, messages=(a, b))) != key(replace(CHAT, messages=(b, a)))
    assert chat(seed=1, top_p=2) == chat(top_p=2, seed=1)
    assert chat(stop=["a", "b"]) != chat(stop=["b", "a"])


def test_every_part_of_a_message_is_in_the_key() -> None:
    call = ToolCall(id="1", name="f", arguments="{}")
    messages = [
        Message("user", "a"),
        Message("user", None),
        Message("user", ""),
        Message("user", [{"type": "text", "text": "a"}]),
        Message("user", "a", name="eve"),
        Message("user", "a", tool_calls=(call,)),
        Message("user", "a", tool_calls=(replace(call, arguments="{ }"),)),
        Message("user", "a", tool_calls=(replace(call, id="2"),)),
        Message("user", "a", tool_call_id="1"),
        Message("user", "a", extra={"cache_control": {"type": "ephemeral"}}),
    ]
    assert len({key(replace(CHAT, messages=(message,))) for message in messages}) == len(messages)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "nan is not a number"),
        (math.inf, "inf is not a number"),
        ("half \ud800", "surrogates not allowed"),
        (b"bytes", "bytes are no JSON"),
        ({1: "one"}, "a name in JSON is a text, not int"),
        ({1, 2}, "set is no JSON"),
        (object(), "object is no JSON"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_json_cannot_carry_is_refused_with_the_reason_and_without_the_text(value: Any, reason: str) -> None:
    with pytest.raises(NotJSON, match=reason) as refused:
        chat(value=value)
    assert "half" not in str(refused.value)


def test_json_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NotJSON, match="nested too deeply"):
        chat(value=endless)


@given(st.dictionaries(names, values, max_size=6), st.randoms())
def test_canonical_json_does_not_depend_on_the_order_of_names(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)


@given(values, values)
def test_canonical_json_is_equal_exactly_where_the_json_is(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) == (_normal(a) == _normal(b))


def _normal(value: Any) -> Any:
    """JSON values that Python itself holds apart or together in the way that JSON does: true is not 1, and 1.0 is."""
    if isinstance(value, bool) or value is None:
        return ("constant", value)
    if isinstance(value, float) and abs(value) >= 2**53:
        return ("large float", value)
    if isinstance(value, (int, float)):
        return ("number", value)
    if isinstance(value, list):
        return ("list", [_normal(v) for v in cast("Any", value)])
    if isinstance(value, Mapping):
        return ("object", {name: _normal(v) for name, v in cast("Mapping[str, Any]", value).items()})
    return ("text", value)


@given(texts, texts, texts, texts)
def test_scores_share_a_key_only_if_they_are_the_same(a: str, b: str, c: str, d: str) -> None:
    one, other = Score(identity="i", context=a, continuation=b), Score(identity="i", context=c, continuation=d)
    assert (key(one) == key(other)) == ((a, b) == (c, d))


# Stored replies

counts = st.integers(0, 2**40)
finite = st.floats(allow_nan=False, allow_infinity=False)
logprobs = st.floats(max_value=0, allow_nan=False)
replies = st.builds(
    Reply,
    text=texts,
    finish=st.sampled_from(["stop", "length", "tool_calls", "content_filter"]),
    usage=st.builds(
        Usage,
        prompt_tokens=counts,
        completion_tokens=counts,
        cached_tokens=counts,
        reasoning_tokens=counts,
        estimated=st.booleans(),
    ),
    tool_calls=st.lists(st.builds(ToolCall, id=texts, name=texts, arguments=texts), max_size=2).map(tuple),
    reasoning=texts,
    refusal=st.none() | texts,
    logprobs=st.lists(
        st.builds(TokenLogprob, texts, logprobs, st.lists(st.tuples(texts, logprobs), max_size=2).map(tuple)),
        max_size=3,
    ).map(tuple),
    embeddings=st.lists(st.lists(finite, max_size=3).map(tuple), max_size=2).map(tuple),
    model=texts,
    upstream=texts,
    cost=st.none() | finite,
    bought_at=finite,
    seconds=finite,
    origin=st.none() | st.builds(Origin, texts, texts),
)
FULL = Reply(
    text="hello",
    tool_calls=(ToolCall(id="1", name="f", arguments="{}"),),
    refusal="no",
    logprobs=(TokenLogprob("a", -1.5, (("a", -1.5), ("b", -math.inf))),),
    embeddings=((0.5, 1.0),),
    cost=0.1,
    bought_at=1e9,
    origin=Origin("0" * 32, "0" * 16),
)


@given(replies)
def test_a_stored_reply_comes_back_as_it_was_but_as_a_hit(reply: Reply) -> None:
    loaded = Reply.load(reply.dump())
    assert loaded == reply.named("hit")
    assert loaded.cached


@given(st.binary(max_size=200))
def test_bytes_that_are_no_stored_reply_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Reply.load(data)


def test_a_reply_that_is_cut_off_anywhere_is_refused() -> None:
    data = FULL.dump()
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            Reply.load(data[:length])


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return (pytest.fail, ("a stored value was run",))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_not_run(protocol: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        Reply.load(pickle.dumps(Bomb(), protocol))


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_a_reply_of_another_version_is_refused(version: Any) -> None:
    with pytest.raises(ValueError, match="of this version"):
        Reply.load(orjson.dumps(orjson.loads(FULL.dump()) | {"v": version}))


@pytest.mark.parametrize("name", sorted(set(orjson.loads(FULL.dump())) - {"v"}))
@pytest.mark.parametrize("value", [{}, {"x": 1}, [[]], [1], "NaN", True])
def test_a_reply_with_a_field_of_another_kind_is_refused_or_still_a_reply(name: str, value: Any) -> None:
    body = orjson.loads(FULL.dump()) | {name: value}
    try:
        reply = Reply.load(orjson.dumps(body))
    except ValueError:
        return
    # What was taken is of the type that it claims to be, so nothing breaks on it later.
    assert Reply.load(reply.dump()) == reply
    assert isinstance((reply.usage + reply.usage).total_tokens, int)
    assert isinstance(reply.likelihood.total, float)


@pytest.mark.parametrize("name", sorted(set(orjson.loads(FULL.dump())) - {"v"}))
def test_a_reply_that_lacks_a_field_is_refused(name: str) -> None:
    body = orjson.loads(FULL.dump())
    del body[name]
    with pytest.raises(ValueError, match=f"no {name}"):
        Reply.load(json.dumps(body).encode())


def test_a_reply_with_half_a_surrogate_pair_cannot_be_stored() -> None:
    with pytest.raises(ValueError, match="JSON cannot carry"):
        Reply(text="\ud83d").dump()


def test_a_conversation_goes_on_with_the_reply_and_its_tool_calls() -> None:
    call = ToolCall(id="1", name="f", arguments="{}")
    assert Reply(text="hi").message == Message("assistant", "hi")
    assert Reply(tool_calls=(call,)).message == Message("assistant", None, tool_calls=(call,))


def test_the_text_of_a_message_of_parts_is_its_text_parts() -> None:
    message = Message("user", [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}])
    assert message.text == "a\nb"
    assert Message("user").text == ""


def test_a_mean_is_nats_a_token() -> None:
    reply = Reply(logprobs=(TokenLogprob("a", -1.0), TokenLogprob("b", -3.0)))
    assert (reply.likelihood.total, reply.likelihood.tokens, reply.likelihood.mean) == (-4.0, 2, -2.0)


TEXTS = st.text(max_size=20)
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(("system", "user", "assistant", "tool")),
    content=TEXTS | st.none() | st.lists(st.dictionaries(TEXTS, JSONS, max_size=2), max_size=2),
    name=TEXTS | st.none(),
    tool_call_id=TEXTS | st.none(),
    extra=st.dictionaries(TEXTS, JSONS, max_size=2),
)
CHATS = st.builds(
    Chat,
    identity=TEXTS,
    messages=st.lists(MESSAGES, max_size=3).map(tuple),
    params=st.dictionaries(TEXTS, JSONS, max_size=3),
    schema=st.none() | st.dictionaries(TEXTS, JSONS, max_size=2),
    draw=st.none() | TEXTS,
)
COMPLETIONS = st.builds(
    Completion, identity=TEXTS, prompt=TEXTS, params=st.dictionaries(TEXTS, JSONS, max_size=3), draw=st.none() | TEXTS
)


@given(CHATS | COMPLETIONS)
def test_however_a_call_is_written_out_its_key_hashes_its_canonical_description(call: Chat | Completion) -> None:
    assert body(call) == canonical(describe(call))


@given(CHATS | COMPLETIONS, TEXTS)
def test_a_draw_of_a_call_is_written_as_if_it_had_been_made_so(call: Chat | Completion, draw: str) -> None:
    undrawn = replace(call, draw=None)
    made = drawn(undrawn, body(undrawn), draw)
    assert made == replace(call, draw=draw)
    assert body(made) == canonical(describe(made))
    assert key(made) == key(replace(call, draw=draw))


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b"])
def test_half_a_surrogate_pair_is_told_from_text(text: str) -> None:
    for call in (
        Chat(identity="a", messages=(Message("user", text),)),
        Chat(identity=text, messages=()),
        Completion(identity="a", prompt=text),
    ):
        with pytest.raises(NotJSON):
            key(call)
