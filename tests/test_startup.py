"""`asmodel serve`: it starts whole or not at all, and says why in one message."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serving import COMMAND, PATIENCE, Server, environment, eventually, listens, serving, upstream

from asmodel.testing import Fault, ScriptedServer

HELLO: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}

HAIKU = """
from asmodel import Run, program


@program("haiku")
async def haiku(run: Run) -> str:
    return "waves"
"""

NOWHERE = upstream("http://127.0.0.1:9/v1")


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        yield server


def refused(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Start a server that must not start: what it says, which is one message. It leaves nothing behind."""
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments],
        cwd=folder,
        env={**os.environ, **environment(folder), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert out == ""
    assert "Traceback" not in errors
    lines = errors.splitlines()
    assert lines
    assert all(line.startswith("asmodel: ") for line in lines), errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return errors


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("settings", "files", "says"),
    [
        ("prot = 8001\n" + NOWHERE, {}, ["asmodel.toml line 1", "prot", 'did you mean "port"']),
        ("port = \n", {}, ["asmodel.toml line 1"]),
        (NOWHERE + "tiemout = 3\n", {}, ["tiemout", "timeout"]),
        (NOWHERE + 'api_key = "env:NO_SUCH_KEY"\n', {}, ["NO_SUCH_KEY"]),
        ('[upstreams.default]\nkind = "opnai"\n', {}, ["opnai", "openai"]),
        (upstream("localhost:80"), {}, ["upstreams.default.base_url", "http://127.0.0.1"]),
        (NOWHERE, {"broken.py": "x = 1\ndef (\n"}, ["broken.py, line 2", "syntax"]),
        (NOWHERE, {"broken.py": "import nowhere_to_be_found\n"}, ["broken.py, line 1", "nowhere_to_be_found"]),
        (NOWHERE, {"a.py": HAIKU, "b.py": HAIKU}, ['two programs are named "haiku"', "a.py:5", "b.py:5"]),
        (NOWHERE, {"a.py": HAIKU.replace('"haiku"', '"plain"')}, ['"plain"', "a.py:5", "plain.py"]),
        (NOWHERE, {"a.py": HAIKU.replace('"haiku"', '"Hai Ku"')}, ["a.py, line 5", "Hai Ku", "lower-case"]),
        (upstream("http://127.0.0.1:9/v1", "plain"), {}, ['"plain" is both an upstream and a program']),
        (upstream("http://127.0.0.1:9/v1", "plain:x"), {}, ['"plain:x"', "also reads as"]),
        (NOWHERE + '[models.plain]\nprogram = "plain"\n', {}, ['"plain" is both a preset and a program']),
        (NOWHERE + '[models.mine]\nprogram = "plian"\n', {}, ["models.mine", 'did you mean "plain"']),
        (NOWHERE + '[models.mine]\nprogram = "plain"\nparams = { a = 1 }\n', {}, ['"mine"', "takes no parameters"]),
        (NOWHERE + '[roles]\nwriter = "defualt"\n', {}, ["[roles]", '"writer"', 'did you mean "default"']),
        (NOWHERE + '[programs.nobody.roles]\nwriter = "default"\n', {}, ["programs.nobody", "no program"]),
        (NOWHERE + '[cache]\nkind = "dsik"\n', {}, ["dsik", "disk"]),
    ],
)
def test_what_is_wrong_is_said_in_one_message_and_nothing_is_started(
    tmp_path: Path, settings: str, files: dict[str, str], says: list[str]
) -> None:
    (tmp_path / "asmodel.toml").write_text(settings)
    (tmp_path / "programs").mkdir()
    for name, text in files.items():
        (tmp_path / "programs" / name).write_text(text)
    port = free_port()
    errors = refused(tmp_path, "--programs", "programs", "--port", str(port))
    for part in says:
        assert part.lower() in errors.lower()
    assert len(errors.splitlines()) == 1
    assert not listens(port)
    assert not (tmp_path / "cache").exists(), "nothing was opened"


def test_a_program_folder_and_a_settings_file_that_are_not_there_are_named(tmp_path: Path) -> None:
    assert "no-such-folder" in refused(tmp_path, "--programs", "no-such-folder")
    assert "no-such-file.toml" in refused(tmp_path, "--config", "no-such-file.toml")


def test_a_port_in_use_is_said_with_another_to_try(tmp_path: Path) -> None:
    (tmp_path / "asmodel.toml").write_text(NOWHERE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        errors = refused(tmp_path, "--port", str(port))
    assert f"cannot listen at 127.0.0.1:{port}: address already in use; try another port: --port " in errors


def test_an_address_that_others_can_reach_is_refused_without_keys(tmp_path: Path) -> None:
    (tmp_path / "asmodel.toml").write_text(NOWHERE)
    errors = refused(tmp_path, "--host", "0.0.0.0", "--port", "0")
    assert "keys" in errors
    assert "127.0.0.1" in errors


def test_the_embedded_model_is_not_served_to_others_unless_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "asmodel.toml").write_text('[keys]\nann = "annes-long-key"\n')
    assert "[upstreams.default]" in refused(tmp_path, "--host", "0.0.0.0", "--port", "0")


def test_with_keys_others_are_answered(tmp_path: Path, up: ScriptedServer) -> None:
    settings = upstream(up.base_url) + '[keys]\nann = "annes-long-key"\n'
    with serving(tmp_path, settings, "--host", "0.0.0.0") as server:
        headers = {"authorization": "Bearer annes-long-key", "host": "some.example"}
        assert server.chat(HELLO, headers).status == 200


# ---- what is only found out when it is asked ----


def test_an_unreachable_upstream_is_an_error_of_the_request_that_says_what_to_check(tmp_path: Path) -> None:
    settings = upstream(f"http://127.0.0.1:{free_port()}/v1", retries=0)
    with serving(tmp_path, settings) as server:
        answer = server.chat(HELLO)
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_unreachable")
        assert "upstreams.default.base_url" in answer.json["error"]["message"]
        assert server.ask("GET", "/readyz").status == 200


def test_a_wrong_key_is_an_error_of_the_request_that_names_its_setting_and_not_the_key(tmp_path: Path) -> None:
    with (
        ScriptedServer(faults=lambda received: Fault(status=401, message="Incorrect API key")) as refusing,
        serving(tmp_path, upstream(refusing.base_url, api_key="sk-very-wrong")) as server,
    ):
        answer = server.chat(HELLO)
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_auth")
        assert "upstreams.default.api_key" in answer.json["error"]["message"]
        assert "sk-very-wrong" not in answer.body.decode() + server.said


def test_a_role_that_nobody_plays_is_named_with_who_could(tmp_path: Path, up: ScriptedServer) -> None:
    with serving(tmp_path, upstream(up.base_url, "only")) as server:
        answer = server.chat(HELLO)
        assert answer.status == 400
        for part in ('"writer"', '"plain"', "[upstreams.default]", "only"):
            assert part in answer.json["error"]["message"]
        assert up.requests == []
        assert server.chat({**HELLO, "asmodel": {"roles": {"writer": "only"}}}).status == 200
        assert server.chat({**HELLO, "model": "plain:only"}).status == 200


# ---- the start and the end ----


def worked(pid: int) -> float:
    """Seconds that the process has had of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads time and memory from /proc")
def test_a_server_is_alive_within_a_second_and_a_half_and_idles_under_120_megabytes(
    tmp_path: Path, up: ScriptedServer
) -> None:
    took: list[float] = []
    for _ in range(5):
        # On a machine that has more to do than it can, only the server's own share of it says anything.
        busy = os.getloadavg()[0] > (os.cpu_count() or 1) - 0.5
        with serving(tmp_path, upstream(up.base_url)) as server:
            took.append(worked(server.process.pid) if busy else time.monotonic() - server.started_at)
            assert server.chat(HELLO).status == 200
            status = Path(f"/proc/{server.process.pid}/status").read_text()
            assert int(status.split("VmRSS:")[1].split()[0]) < 120_000
    assert statistics.median(took) < 1.5


def test_a_server_says_where_it_is_and_what_it_serves(tmp_path: Path, up: ScriptedServer) -> None:
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "haiku.py").write_text(HAIKU)
    with serving(tmp_path, upstream(up.base_url), "--programs", "programs") as server:
        said = server.said
    for part in (server.base_url, "haiku", "plain", "self-consistency", "default (openai: scripted)", "cache"):
        assert part in said
    assert "\x1b" not in said
    folders = ("  cache ", "  responses ")
    assert all(len(line) <= 80 for line in said.splitlines() if not line.startswith(folders))


def test_a_store_that_cannot_be_opened_is_said_and_nothing_is_served(tmp_path: Path) -> None:
    (tmp_path / "asmodel.toml").write_text(NOWHERE)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "asmodel").write_text("a file where the folder should be")
    port = free_port()
    (line,) = refused(tmp_path, "--port", str(port)).splitlines()
    assert "[cache] path" in line
    assert not listens(port)
    assert "[cache] path" in stops(tmp_path, "--port", str(port), "--workers", "2")


def stops(folder: Path, *arguments: str) -> str:
    """The same where there are workers, whose own log says it: the server ends by itself, and not with success."""
    ended = subprocess.run(
        [*COMMAND, "serve", *arguments],
        cwd=folder,
        env={**os.environ, **environment(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode not in (0, -9)
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_a_litellm_upstream_is_imported_after_the_socket_is_open(tmp_path: Path, up: ScriptedServer) -> None:
    settings = f'[upstreams.default]\nkind = "litellm"\nmodel = "openai/scripted"\nbase_url = "{up.base_url}"\n'
    with serving(tmp_path, settings + 'api_key = "unused"\n') as server:
        before = server.ask("GET", "/readyz")
        assert (before.status, before.json) == (503, {"status": "loading"})
        assert before.headers["content-type"] == "application/json"
        eventually("it is loaded", lambda: server.ask("GET", "/readyz").status == 200, 50)
        assert server.chat(HELLO).status == 200


def test_reload_takes_up_a_changed_program_file(tmp_path: Path, up: ScriptedServer) -> None:
    (tmp_path / "programs").mkdir()
    file = tmp_path / "programs" / "haiku.py"
    file.write_text(HAIKU)

    def says(server: Server) -> str | None:
        try:
            answer = server.chat({**HELLO, "model": "haiku"})
        except OSError:
            return None
        return answer.json["choices"][0]["message"]["content"] if answer.status == 200 else None

    with serving(tmp_path, upstream(up.base_url), "--programs", "programs", "--reload") as server:
        assert says(server) == "waves"
        file.write_text(HAIKU.replace("waves", "broken ("))
        file.write_text(HAIKU.replace("waves", "dunes"))
        eventually("the new text is served", lambda: says(server) == "dunes")
