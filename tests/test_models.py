"""What a name stands for, who plays which role, and what is refused before anything is bought."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from asmodel import Answer, Message, Program, Prompt, Reply, Run, program, score, step, tool
from asmodel.calls import Capabilities, Chat, Delta
from asmodel.errors import (
    ConfigurationError,
    InvalidRequest,
    ModelNotFound,
    ProgramError,
    Unsupported,
    UpstreamUnreachable,
)
from asmodel.models import Models, Preset, ServedProgram, ServedUpstream
from asmodel.run import require
from asmodel.service import Asked, Service
from asmodel.testing import FunctionUpstream
from asmodel.upstreams import Cached
from asmodel_plugins.memory_cache import MemoryCache


@step(model="writer")
def write(text: str) -> str:
    return text


@step(model="judge")
def judge(text: str) -> str:
    return text


@step
def plainly(text: str) -> str:
    return text


class Params(BaseModel):
    word: str = "w"


@program("quote", params=Params)
async def quote(run: Run[Params]) -> str:
    """Quote what the writer says."""
    return f"{run.params.word}({await run(write, run.question)})"


@program("echo")
async def echo(run: Run) -> str:
    """Pass on what the writer says."""
    return await run.reply(write, run.question)


@program("court")
async def court(run: Run) -> str:
    return f"{await run(write, 'w')} {await run(judge, 'j')} {await run(plainly, 'p')}"


def upstream(name: str, **can: bool) -> FunctionUpstream:
    capabilities = Capabilities(**{"completion": True, "schema": True, "tools": True, **can})
    return FunctionUpstream(lambda call: name, name=name, capabilities=capabilities)


def models(programs: list[Program[Any, Any]] | None = None, names: str = "default fast judge", **more: Any) -> Models:
    players = {name: upstream(name) for name in names.split()}
    return Models([quote, echo, court] if programs is None else programs, players, **more)


async def answer(served: Models, name: str, question: str = "q", emit: Any = None, **asked: Any) -> Answer:
    service = Service(served)
    service.ready.set()
    job = await service.prepare(served.find(name), Asked(messages=(Message("user", question),), **asked))
    return (await service.answer(job, 0, emit)).answer


# Names


def test_a_name_is_a_program_an_upstream_a_preset_or_a_composition() -> None:
    served = models(presets={"careful": Preset(program="quote", params={"word": "c"})})
    program_, preset, composed = served.find("quote"), served.find("careful"), served.find("quote:fast")
    assert isinstance(program_, ServedProgram)
    assert isinstance(served.find("fast"), ServedUpstream)
    assert isinstance(preset, ServedProgram)
    assert (preset.name, preset.program, preset.params) == ("careful", quote, {"word": "c"})
    assert isinstance(composed, ServedProgram)
    assert composed.everyone == served.find("fast")
    assert [m.name for m in served.all()] == ["quote", "echo", "court", "careful", "default", "fast", "judge"]
    assert program_.description == "Quote what the writer says."


def test_a_composition_is_split_at_its_first_colon() -> None:
    served = Models([quote], {"llama3.2:3b": upstream("llama3.2:3b")})
    composed = served.find("quote:llama3.2:3b")
    assert isinstance(composed, ServedProgram)
    assert composed.everyone == served.find("llama3.2:3b")


async def test_compositions_go_as_deep_as_they_are_written() -> None:
    served = models()
    assert (await answer(served, "quote:fast")).text == "w(fast)"
    assert (await answer(served, "quote:quote:fast")).text == "w(w(fast))"
    assert (await answer(served, "quote:echo:quote:fast")).text == "w(w(fast))"
    assert (await answer(served, "court:quote:fast")).text == "w(fast) w(fast) w(fast)"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("qoute", 'there is no model "qoute"; did you mean "quote"?'),
        ("quote-2", 'there is no model "quote-2"; did you mean "quote"?'),
        ("zzz", 'there is no model "zzz"; there are court, default, echo, fast, judge, quote'),
        ("quote:fsat", '"quote:fsat": there is no model "fsat"; did you mean "fast"?'),
        ("quote:", 'there is no model ""'),
        ("fast:quote", 'there is no model "fast:quote"'),
        ("Quote", "did you mean"),
        ("", 'there is no model ""'),
    ],
)
def test_a_name_that_stands_for_nothing_is_told_the_nearest_that_does(name: str, told: str) -> None:
    with pytest.raises(ModelNotFound) as refused:
        models().find(name)
    assert told in str(refused.value)
    assert (refused.value.status, refused.value.param) == (404, "model")


def test_two_things_with_one_name_stop_the_server_and_are_both_named() -> None:
    @program("quote")
    async def other(run: Run) -> str:
        return ""

    with pytest.raises(ConfigurationError, match=r'two programs are named "quote": .*test_models\.py:\d+ and .*:\d+'):
        models([quote, other])
    with pytest.raises(
        ConfigurationError, match=r'"quote" is both an upstream and a program \(.*test_models\.py:\d+\)'
    ):
        models(names="quote")
    with pytest.raises(ConfigurationError, match=r'the upstream "quote:3b" also reads as the program "quote"'):
        models(names="quote:3b")
    for name in ("quote", "fast"):
        with pytest.raises(ConfigurationError, match=f'"{name}" is both a preset and a'):
            models(presets={name: Preset(program="quote")})
    with pytest.raises(ConfigurationError, match=r'the preset "quote:x" also reads as the program "quote"'):
        models(presets={"quote:x": Preset(program="quote")})


def test_settings_that_name_nothing_stop_the_server_and_say_where() -> None:
    with pytest.raises(ConfigurationError, match=r'\[models\.x\]: there is no program "qoute"; did you mean "quote"'):
        models(presets={"x": Preset(program="qoute")})
    with pytest.raises(ConfigurationError, match=r'\[models\.x\]: "quote:fsat": there is no model "fsat"'):
        models(presets={"x": Preset(program="quote:fsat")})
    with pytest.raises(ConfigurationError, match=r'\[programs\.qoute\]: there is no program "qoute"'):
        models(program_roles={"qoute": {}})
    with pytest.raises(ConfigurationError, match=r'\[roles\]: role "writer": there is no model "fsat"; did you mean'):
        models(roles={"writer": "fsat"})
    with pytest.raises(ConfigurationError, match=r'\[programs\.quote\.roles\]: role "writer": there is no model'):
        models(program_roles={"quote": {"writer": "fsat"}})
    with pytest.raises(ConfigurationError, match=r'\[models\.x\] roles: role "writer": there is no model'):
        models(presets={"x": Preset(program="quote", roles={"writer": "fsat"})})


def test_a_preset_that_is_made_of_itself_stops_the_server() -> None:
    with pytest.raises(ConfigurationError, match=r'"quote:x" is made of itself: quote:x > x > quote:x'):
        models(presets={"x": Preset(program="quote:x")})


def test_a_preset_may_be_a_composition() -> None:
    served = models(presets={"x": Preset(program="quote:fast", description="Fast quotes.")})
    found = served.find("x")
    assert isinstance(found, ServedProgram)
    assert (found.name, found.description) == ("x", "Fast quotes.")
    assert found.everyone == served.find("fast")


# Roles


@pytest.mark.parametrize(
    ("settings", "request_roles", "name", "player"),
    [
        # Each line leaves out what stood first in the line before it.
        ("preset program roles", {"writer": "r"}, "preset", "r"),
        ("preset program roles", {}, "preset", "p"),
        ("program roles", {}, "preset", "o"),
        ("roles", {}, "preset", "s"),
        ("", {}, "preset", "writer"),
        ("preset program roles", {}, "echo", "o"),
        ("roles default", {}, "echo", "s"),
        ("default", {}, "echo", "writer"),
        ("program roles", {}, "echo:r", "r"),
        ("program roles", {"writer": "p"}, "echo:r", "p"),
    ],
)
async def test_who_plays_a_role_is_said_by_the_nearest_who_says_it(
    settings: str, request_roles: dict[str, str], name: str, player: str
) -> None:
    served = models(
        names="default writer r p o s",
        presets={"preset": Preset(program="echo", roles={"writer": "p"} if "preset" in settings else {})},
        program_roles={"echo": {"writer": "o"}} if "program" in settings else {},
        roles=({"writer": "s"} if "roles" in settings else {}) | ({"default": "o"} if "default" in settings else {}),
    )
    assert (await answer(served, name, roles=request_roles)).text == player


async def test_a_role_that_nobody_names_is_played_by_default() -> None:
    assert (await answer(models(), "court")).text == "default judge default"
    assert (await answer(models(), "court", roles={"default": "fast"})).text == "fast judge fast"
    assert (await answer(models(roles={"default": "fast"}), "court")).text == "fast judge fast"
    assert (await answer(models(program_roles={"court": {"default": "fast"}}), "court")).text == "fast judge fast"


async def test_a_role_that_nobody_can_play_is_refused_with_what_to_write() -> None:
    with pytest.raises(
        InvalidRequest, match=r'nobody plays the role "writer" of program "quote": write \[upstreams\.def'
    ):
        await answer(models(names="fast"), "quote")


async def test_a_requests_role_must_name_a_model() -> None:
    with pytest.raises(InvalidRequest, match='role "writer": there is no model "fsat"; did you mean "fast"') as refused:
        await answer(models(), "quote", roles={"writer": "fsat"})
    assert refused.value.param == "asmodel.roles.writer"


async def test_a_role_may_be_played_by_a_program_and_its_roles_by_others() -> None:
    served = models(roles={"judge": "quote"}, program_roles={"quote": {"writer": "fast"}})
    assert (await answer(served, "court")).text == "default w(fast) default"


async def test_a_request_that_gives_a_role_to_a_program_gives_it_no_role_in_itself() -> None:
    assert (await answer(models(), "echo", roles={"writer": "quote"})).text == "w(default)"


@pytest.mark.parametrize(
    ("roles", "circle"),
    [
        ({"echo": {"writer": "echo"}}, "echo > echo"),
        ({"echo": {"writer": "quote"}, "quote": {"writer": "echo"}}, "quote > echo > quote"),
        ({"court": {"judge": "echo"}, "echo": {"writer": "court"}}, "court > echo > court"),
    ],
)
async def test_roles_that_lead_in_a_circle_are_refused_before_anything_is_bought(
    roles: dict[str, dict[str, str]], circle: str
) -> None:
    served = models(program_roles=roles)
    with pytest.raises(InvalidRequest, match=f"the roles lead in a circle: {circle}; say in"):
        await answer(served, "echo")
    assert all(not up.calls for up in served.upstreams.values() if isinstance(up, FunctionUpstream))


async def test_a_program_nested_by_using_keeps_the_roles_that_it_was_given() -> None:
    @program("outer")
    async def outer(run: Run) -> str:
        return await run(echo.using(roles={"writer": "fast"}), "x")

    assert (await answer(models([outer]), "outer")).text == "fast"
    assert (await answer(models([outer], roles={"writer": "judge"}), "outer")).text == "fast"
    assert (await answer(models([outer]), "outer", roles={"writer": "judge"})).text == "judge"


# Params


async def test_params_come_from_the_request_then_the_preset_then_the_settings() -> None:
    served = models(
        presets={"x": Preset(program="quote", params={"word": "preset"})},
        program_params={"quote": {"word": "settings"}},
    )
    assert (await answer(served, "quote")).text == "settings(default)"
    assert (await answer(served, "x")).text == "preset(default)"
    assert (await answer(served, "x", params={"word": "request"})).text == "request(default)"
    assert (await answer(served, "echo:quote")).text == "settings(default)"


# A program that plays a role


async def test_a_program_that_is_the_reply_of_another_streams_through_it() -> None:
    deltas: list[Delta] = []

    async def emit(delta: Delta) -> None:
        deltas.append(delta)

    served = Models([echo, quote], {"default": FunctionUpstream(lambda call: "a long answer", name="default")})
    assert (await answer(served, "echo:echo:echo", emit=emit)).text == "a long answer"
    assert len(deltas) > 1
    assert "".join(d.text for d in deltas) == "a long answer"
    deltas.clear()
    assert (await answer(served, "echo:quote", emit=emit)).text == "w(a long answer)"
    assert "".join(d.text for d in deltas) == "w(a long answer)"


async def test_draws_of_a_program_that_plays_a_role_differ_and_are_the_same_on_resume() -> None:
    @program("votes")
    async def votes(run: Run) -> str:
        return " ".join([await run(write, text) for text in ("same", "same", "other")])

    @program("thinks")
    async def thinks(run: Run) -> str:
        return await run(write, "whatever the question")

    numbers = iter(range(100))
    bought = FunctionUpstream(lambda call: str(next(numbers)), name="up")
    served = Models([votes, thinks], {"default": Cached(bought, MemoryCache())})
    first = await answer(served, "votes:thinks")
    assert first.text == "0 1 2"
    assert (await answer(served, "votes:thinks")).text == first.text
    assert len(bought.calls) == 3


async def test_a_program_answers_no_score_and_no_raw_text() -> None:
    @score(model="scorer")
    def fits(text: str) -> tuple[str, str]:
        return text, text

    @step(model="scorer")
    def raw(text: str) -> Prompt:
        return Prompt(text)

    for asked, cannot in ((fits, "give the log-likelihood of given text"), (raw, "continue raw text")):

        def make(asked: Any) -> Program[None, str]:
            @program("scores")
            async def scores(run: Run) -> str:
                return str(await run(asked, "x"))

            return scores

        served = Models([make(asked), echo], {"default": upstream("default")}, roles={"scorer": "echo"})
        with pytest.raises(Unsupported, match=f'needs an upstream that can {cannot}, and "echo"'):
            await answer(served, "scores")


async def test_a_program_that_is_asked_for_what_was_not_foreseen_says_who_should_be_asked() -> None:
    @step(model="scorer")
    def shows(text: str) -> Any:
        return Prompt(text)

    @program("shows")
    async def surprises(run: Run) -> str:
        return str(await run(shows, "x"))

    served = Models([surprises, echo], {"default": upstream("default")}, roles={"scorer": "echo"})
    with pytest.raises(
        ProgramError, match='"shows" makes a completion call, and the program "echo", which plays its role'
    ):
        await answer(served, "shows")


# What an upstream cannot do


def needing(asked: Any) -> Program[None, str]:
    @program("needs")
    async def needs(run: Run) -> str:
        return str(await run(asked, "x"))

    return needs


@score(model="scorer")
def likelihood(text: str) -> tuple[str, str]:
    return text, text


@step(model="scorer", returns=int)
def number(text: str) -> str:
    return text


@step(model="scorer")
def continued(text: str) -> Prompt:
    return Prompt(text)


@tool
def add(a: int) -> int:
    """Add."""
    return a


@step(model="scorer", returns=Reply, tools=[add])
def tooled(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("asked", "field", "what"),
    [
        (likelihood, "loglikelihood", "give the log-likelihood of given text"),
        (number, "schema", "keep to a JSON schema"),
        (continued, "completion", "continue raw text"),
        (tooled, "tools", "call tools"),
        (write, "chat", "chat"),
    ],
)
async def test_an_upstream_that_cannot_is_refused_before_anything_is_bought_and_those_that_can_are_named(
    asked: Any, field: str, what: str
) -> None:
    cannot, can, other = (upstream(name, **{field: name == "able"}) for name in ("default", "able", "other"))
    served = Models([needing(asked)], {"default": cannot, "able": can, "other": other})
    with pytest.raises(Unsupported) as refused:
        await answer(served, "needs")
    assert str(refused.value) == (
        f'program "needs": step "{asked.name}" needs an upstream that can {what}, and "default", which plays its role '
        f'"{asked.role}", cannot; these can: "able" (set "{asked.role}" under [roles])'
    )
    assert (refused.value.status, refused.value.code) == (400, "upstream_cannot")
    assert cannot.calls == can.calls == other.calls == []
    assert await answer(served, "needs", roles={asked.role: "able"}) if field in ("chat", "completion") else True


async def test_where_no_upstream_can_it_says_so_and_one_that_cannot_be_reached_is_passed_over() -> None:
    class Unreachable(FunctionUpstream):
        async def capabilities(self) -> Capabilities:
            raise UpstreamUnreachable("down")

    served = Models([needing(likelihood)], {"default": upstream("default"), "away": Unreachable(lambda call: "")})
    with pytest.raises(Unsupported, match="cannot; none that is set can"):
        await answer(served, "needs")


async def test_an_upstream_that_must_try_is_tried_before_it_is_refused() -> None:
    tried: list[str] = []

    class Tries(FunctionUpstream):
        async def detect(self) -> Capabilities:
            tried.append(self.name)
            return Capabilities(loglikelihood=self.name == "default")

    def tries(name: str) -> Tries:
        return Tries(lambda call: (-1.0, 1), name=name, capabilities=Capabilities())

    served = Models([needing(likelihood)], {"default": Cached(tries("default"), None), "other": tries("other")})
    assert (await answer(served, "needs")).text == "LogLikelihood(total=-1.0, tokens=1)"
    assert tried == ["default"]
    with pytest.raises(Unsupported):
        await answer(served, "needs", roles={"scorer": "other"})


async def test_what_a_nested_or_a_playing_program_needs_is_asked_for_too() -> None:
    @program("outer")
    async def outer(run: Run) -> str:
        return await run(inner, "x")

    inner = needing(likelihood)
    players: dict[str, Any] = {"default": upstream("default")}
    with pytest.raises(Unsupported, match='program "needs": step "likelihood"'):
        await answer(Models([outer], players), "outer")
    with pytest.raises(Unsupported, match='program "needs": step "likelihood"'):
        await answer(Models([echo, inner], players), "echo:needs")


async def test_a_playing_program_wants_its_params_before_anything_is_bought() -> None:
    class Must(BaseModel):
        word: str

    @program("must", params=Must)
    async def must(run: Run[Must]) -> str:
        return run.params.word

    with pytest.raises(InvalidRequest, match='program "must": word: Field required'):
        await answer(Models([echo, must], {"default": upstream("default")}), "echo:must")


# What a program's code names


@step
def named_in_a_lambda(text: str) -> str:
    return text


STEPS = {"a": write, "b": [judge]}


def helper(run: Run) -> Any:
    return run(plainly, "x")


async def test_the_steps_of_a_program_are_those_that_its_code_names_anywhere() -> None:
    local = write.using(temperature=0)

    @program("finds")
    async def finds(run: Run) -> str:
        async def inside() -> str:
            return await run(local, "x")

        listed = [s.name for s in (number,)]
        return f"{await (lambda: run(named_in_a_lambda, 'x'))()} {await helper(run)} {STEPS} {listed} {inside}"

    assert {s.name for s in finds.steps} == {"named_in_a_lambda", "plainly", "write", "judge", "number"}
    assert local in finds.steps


async def test_an_attribute_that_is_called_like_a_step_is_not_that_step() -> None:
    class Thing:
        likelihood = 3

    @program("reads")
    async def reads(run: Run) -> str:
        return str(Thing().likelihood)

    assert reads.steps == ()


async def test_of_a_module_only_what_is_named_after_it_counts() -> None:
    from asmodel_programs import evidence_qa

    @program("borrows")
    async def borrows(run: Run) -> str:
        return await run(evidence_qa.answer_from, ["x"], "y")

    assert [s.name for s in borrows.steps] == ["answer_from"]


async def test_require_asks_for_nothing_that_a_program_has_no_use_for() -> None:
    served = models()
    found = served.find("court")
    assert isinstance(found, ServedProgram)
    await require(court, served.cast(found))


async def test_a_playing_program_is_told_what_the_call_asks_for() -> None:
    seen: list[Run] = []

    @program("looks", supports=["response_format", "tools"])
    async def looks(run: Run) -> str:
        seen.append(run)
        return '{"value": 3}'

    served = Models([needing(number.using(temperature=0.5)), looks], {"default": upstream("default")})
    assert (await answer(served, "needs:looks")).text == "3"
    assert seen[0].request.hints == {"temperature": 0.5}
    shape: Any = seen[0].request.shape["response_format"]
    assert shape["json_schema"]["schema"]["required"] == ["value"]
    assert seen[0].depth == 1


def test_calls_of_a_program_that_plays_are_known_by_its_source() -> None:
    served = models()
    found = served.find("echo")
    assert isinstance(found, ServedProgram)
    player = served.cast(found, {"writer": "quote"}).play("writer")
    assert player.identity == f"program:quote:{quote.digest}"
    assert isinstance(write.call("x", player.identity), Chat)
