"""The container's own command for real: user, read-only root, settings and environment as the chart renders them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.e2e import stores
from tests.e2e.images import BUILD_SECONDS, Given, Image, Pod, image, size
from tests.e2e.kubernetes import ROOT, rendered
from tests.e2e.nginx import Nginx
from tests.redis_serving import free_port, running
from tests.serving import PATIENCE, eventually

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROGRAM = """
from asmodel import Run, program, step


@step(model="default", temperature=0)
def first(question: str) -> str:
    return f"first: {question}"


@step(model="default", temperature=0)
def second(question: str, before: str) -> str:
    return f"second: {question} {before}"


@step(model="default", temperature=0)
def told(question: str, before: str) -> str:
    return f"told: {question} {before}"


@program("three")
async def three(run: Run) -> str:
    before = await run(second, run.question, await run(first, run.question))
    return await run.reply(told, run.question, before)
"""
KEY = "sk-of-alice"
SECRETS = {"clients": {"alice": KEY}, "upstreams": {"UP_KEY": "sk-up"}, "scraping": {"metrics": "sk-metrics"}}


@pytest.fixture(scope="module")
def plain() -> Image:
    """Without litellm, and so with upstreams by base_url alone."""
    return image(litellm=False)


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(answer=answer) as server:
        yield server


def answer(body: Mapping[str, Any]) -> str:
    return " ".join(f"word{number}" for number in range(12)) + f" to {hash_of(body)}"


def hash_of(body: Mapping[str, Any]) -> int:
    return sum(body["messages"][-1]["content"].encode())


def values(up: ScriptedServer, **more: Any) -> dict[str, Any]:
    upstream = {"base_url": up.base_url, "model": "scripted", "api_key": "env:UP_KEY"}
    return {
        "settings": {"upstreams": {"default": upstream}},
        "programs": {"files": {"three.py": PROGRAM}},
        "existingSecret": "upstreams",
        "clientKeys": {"existingSecret": "clients", "holders": ["alice"]},
        "metrics": {"existingSecret": "scraping"},
        "containerPort": free_port(),
        **more,
    }


def pod(folder: Path, made: Image, given: Mapping[str, Any], name: str, *files: Path) -> Pod:
    objects = rendered(*files, values=given)
    (deployment,) = [each for each in objects if each["kind"] == "Deployment" and each["metadata"]["name"] == "asmodel"]
    return Pod(folder, made, deployment["spec"]["template"], Given.of(objects, SECRETS), name=name)


def ask(port: int, method: str, path: str, body: object = None, key: str = KEY) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ready(server: Pod) -> bool:
    """What a kubelet's readiness probe finds."""
    assert not server.ended, server.said
    try:
        return ask(server.port, "GET", "/readyz", key="")[0] == 200
    except OSError:
        return False


def chat(text: str, *, stream: bool = False, model: str = "three") -> dict[str, Any]:
    return {"model": model, "stream": stream, "messages": [{"role": "user", "content": text}]}


@dataclass
class Asked:
    """A client of its own, in a thread: what came back, or what went wrong."""

    port: int
    text: str
    begun: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    body: bytes = b""
    error: str = ""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/chat/completions", json.dumps(chat(self.text, stream=True)), headers)
            response = connection.getresponse()
            self.status = response.status
            while chunk := response.read1(65_536):
                self.body += chunk
                self.begun.set()
        except (OSError, http.client.HTTPException) as error:
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self.begun.set()
            connection.close()

    @property
    def whole(self) -> bool:
        """Whether nothing is missing: the answer's last word, its finish, and the end of the stream."""
        events = [line for line in self.body.split(b"\n") if line.startswith(b"data: ")]
        return (
            not self.error
            and self.status == 200
            and events[-1:] == [b"data: [DONE]"]
            and b'"finish_reason":"stop"' in self.body
            and b'"error"' not in self.body
        )


def finished(asked: Sequence[Asked]) -> None:
    for each in asked:
        each.thread.join(120)
    lost = [f"{each.text}: {each.status} {each.error} …{each.body[-200:]!r}" for each in asked if not each.whole]
    assert not lost, f"{len(lost)} of {len(asked)} were cut: {lost[:3]}"


# ---- the image ----


@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_an_image_is_small_and_is_not_root(plain: Image) -> None:
    assert plain.config["User"] == "10001:10001"
    assert (plain.config["Entrypoint"], plain.config["Cmd"]) == (["asmodel"], ["serve"])
    assert plain.megabytes < 250, f"{plain.megabytes:.0f} MB"
    assert not list((plain.root / "opt/asmodel").rglob("pip/__init__.py")), "what installs is not in what serves"
    print(f"\nwithout litellm: {plain.megabytes:.0f} MB, of which {size(plain.root / 'opt/asmodel'):.0f} are asmodel's")


@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_an_image_with_litellm_is_small_too_and_asks_by_it(tmp_path: Path, up: ScriptedServer) -> None:
    made = image()
    assert made.megabytes < 450, f"{made.megabytes:.0f} MB"
    print(f"\nwith litellm: {made.megabytes:.0f} MB, of which {size(made.root / 'opt/asmodel'):.0f} are asmodel's")
    upstream = {"kind": "litellm", "model": "openai/scripted", "base_url": up.base_url, "api_key": "env:UP_KEY"}
    with pod(tmp_path, made, values(up, settings={"upstreams": {"default": upstream}}), "litellm") as server:
        eventually("it is ready", lambda: ready(server), 120)
        status, body = ask(server.port, "POST", "/v1/chat/completions", chat("what?"))
        assert status == 200, body
        assert len(up.requests) == 3
        assert server.terminate()[0] == 0


# ---- one pod ----


def test_a_pod_answers_as_another_user_with_a_read_only_root(tmp_path: Path, plain: Image, up: ScriptedServer) -> None:
    with pod(tmp_path, plain, values(up), "one") as server:
        eventually("it is ready", lambda: ready(server), 60)
        assert ask(server.port, "GET", "/healthz", key="")[0] == 200
        status, body = ask(server.port, "POST", "/v1/chat/completions", chat("what?"))
        assert status == 200, body
        assert json.loads(body)["asmodel"]["upstream_calls"] == 3
        assert ask(server.port, "POST", "/v1/chat/completions", chat("what?"), key="sk-another")[0] == 401
        assert ask(server.port, "GET", "/metrics", key="sk-metrics")[0] == 200
        assert up.requests[0].headers["authorization"] == "Bearer sk-up"

        told = server.status()
        assert told["Uid"].split() == ["10001"] * 4
        assert told["NoNewPrivs"] == "1"
        assert int(told["CapBnd"], 16) == int(told["CapEff"], 16) == 0
        assert "Read-only file system" in server.run("sh", "-c", "touch /opt/asmodel/x; touch /x").stderr
        # What is kept is private, in a volume that is not the server's own.
        cache = server.volume("data") / "cache" / "asmodel"
        assert (cache.stat().st_uid, cache.stat().st_mode & 0o777) == (10001, 0o700)
        traces = server.volume("data") / "state" / "asmodel" / "traces.sqlite"
        eventually("the trace is written", traces.exists)
        assert traces.stat().st_mode & 0o777 == 0o600
        # An operator looks into it; an image's own health check asks it.
        eventually("the run is found", lambda: "three" in server.run("asmodel", "trace").stdout)
        assert server.run("asmodel", "health", "--ready").returncode == 0
        for line in server.said.splitlines():
            assert "Traceback" not in line
            assert KEY not in line
        code, _ = server.terminate()
        assert code == 0


def test_the_question_of_helm_test_is_answered(tmp_path: Path, plain: Image, up: ScriptedServer) -> None:
    given = values(up, test={"model": "three", "question": "And?"})
    with pod(tmp_path, plain, given, "server") as server:
        eventually("it is ready", lambda: ready(server), 60)
        objects = rendered(values=given)
        (asking,) = [each for each in objects if each["kind"] == "Pod"]
        for variable in asking["spec"]["containers"][0]["env"]:
            if variable["name"] == "ADDRESS":
                # There is no name service here that knows Services.
                variable["value"] = f"http://127.0.0.1:{server.port}/v1"
        with Pod(tmp_path, plain, asking, Given.of(objects, SECRETS), name="question") as question:
            assert question.wait(60) == 0, question.said
            assert "three: word0 word1" in question.said


def test_a_pod_that_is_stopped_ends_its_streams_within_the_grace(
    tmp_path: Path, plain: Image, up: ScriptedServer
) -> None:
    up.token_delay = 0.4  # A stream of five seconds.
    given = values(up, shutdown={"preStopSeconds": 2, "drainSeconds": 30})
    with pod(tmp_path, plain, given, "streaming") as server:
        eventually("it is ready", lambda: ready(server), 60)
        asked = [Asked(server.port, f"question {number}") for number in range(20)]
        for each in asked:
            assert each.begun.wait(PATIENCE)
        late: list[Asked] = []

        def between() -> None:
            time.sleep(1)
            # A balancer that has not heard of it yet still sends requests here.
            late.append(Asked(server.port, "late"))

        threading.Thread(target=between, daemon=True).start()
        code, seconds = server.terminate()
        assert code == 0, server.said
        finished(asked + late)
        # As long as the streams took, and no longer: nobody waits for the end of the grace.
        assert seconds < server.grace - server.pre_stop - 5
        assert "Traceback" not in server.said


def test_what_would_never_end_is_told_so_before_the_grace_is_over(
    tmp_path: Path, plain: Image, up: ScriptedServer
) -> None:
    up.token_delay = 30.0
    given = values(up, shutdown={"preStopSeconds": 0, "drainSeconds": 2})
    with pod(tmp_path, plain, given, "endless") as server:
        eventually("it is ready", lambda: ready(server), 60)
        asked = Asked(server.port, "for ever")
        assert asked.begun.wait(PATIENCE)
        code, _ = server.terminate()
        assert code == 0, server.said
        asked.thread.join(PATIENCE)
        assert b'"code":"draining"' in asked.body


@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_the_laptop_example_answers_with_the_model_in_its_image(tmp_path: Path) -> None:
    made = image(litellm=False, embedded=True)
    example = ROOT / "helm" / "examples" / "laptop.yaml"
    more = {"containerPort": free_port(), "telemetry": {"endpoint": ""}, "clientKeys": {"existingSecret": "clients"}}
    given = more | {"clientKeys": {"existingSecret": "clients", "holders": ["alice"]}}
    with pod(tmp_path, made, given, "laptop", example) as server:
        eventually("it is ready", lambda: ready(server), 120)
        question = yaml.safe_load(example.read_text())["test"]["question"]
        status, body = ask(server.port, "POST", "/v1/chat/completions", chat(question, model="haiku"))
        assert status == 200, body
        assert json.loads(body)["choices"][0]["message"]["content"]
        assert server.terminate()[0] == 0
    print(f"\nwith the embedded model: {made.megabytes:.0f} MB")


# ---- several pods ----


def test_a_rolling_restart_under_load_loses_no_request_and_buys_no_step_twice(
    tmp_path: Path, plain: Image, up: ScriptedServer
) -> None:
    up.token_delay = 0.05
    up.delay = 0.3
    with running(stores.program("redis"), tmp_path) as store:
        # Patient: on a machine that is busy with something else, a store that is late must not cost a purchase.
        shared = {"kind": "redis", "redis": {"url": store.url}, "options": {"timeout": 10}}

        def made(name: str) -> Pod:
            drain = {"preStopSeconds": 3, "drainSeconds": 60}
            return pod(tmp_path, plain, values(up, replicas=2, cache=shared, shutdown=drain), name)

        pods = [made("old-0").start(), made("old-1").start()]
        asked: list[Asked] = []
        stop = threading.Event()
        try:
            for each in pods:
                eventually("it is ready", lambda each=each: ready(each), 90)
            with Nginx(tmp_path / "nginx", [each.port for each in pods]) as nginx:

                def load() -> None:
                    number = 0
                    while not stop.is_set():
                        # Twice the same at the same moment: they come to two pods, and one of them buys.
                        asked.extend(Asked(nginx.port, f"question {number}") for _ in range(2))
                        number += 1
                        time.sleep(0.25)

                loader = threading.Thread(target=load, daemon=True)
                loader.start()
                time.sleep(2)
                for number in range(2):
                    # As a Deployment does it: one more, and when it is ready one less.
                    new = made(f"new-{number}").start()
                    pods.append(new)
                    eventually("it is ready", lambda new=new: ready(new), 90)
                    old = pods[number]
                    in_service = [each.port for each in pods[number + 1 :]]
                    # That it goes is known to balancers a while after it was told to go.
                    later = threading.Timer(old.pre_stop / 3, nginx.ask, [in_service])
                    later.start()
                    code, _ = old.terminate()
                    later.join()
                    assert code == 0, old.said
                time.sleep(2)
                stop.set()
                loader.join(PATIENCE)
                finished(asked)
                served = {each.name: each.said.count("three") for each in pods}
        finally:
            stop.set()
            for each in pods:
                each.kill()
    bought = [json.dumps(request.body["messages"]) for request in up.requests if "messages" in request.body]
    questions = {each.text for each in asked}
    print(f"\n{len(asked)} streams, {len(questions)} questions, {len(bought)} calls bought; {served}")
    assert len(asked) > 40
    assert len(bought) == len(set(bought)) == 3 * len(questions)
