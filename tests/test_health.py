"""`asmodel health`, by which a container knows how its server is."""

from __future__ import annotations

from pathlib import Path

from tests.serving import command, eventually, serving, upstream

from asmodel.testing import ScriptedServer


def test_a_server_that_answers_is_healthy_and_ready(tmp_path: Path) -> None:
    with ScriptedServer() as up, serving(tmp_path, upstream(up.base_url)) as server:
        eventually("it is ready", lambda: server.ask("GET", "/readyz").status == 200)
        port = {"ASMODEL_PORT": str(server.port)}
        alive = command(tmp_path, "health", env=port)
        assert (alive.returncode, alive.stdout) == (0, '{"status":"ok"}\n')
        assert command(tmp_path, "health", "--ready", env=port).returncode == 0


def test_a_server_at_every_address_is_asked_at_the_loopback_address(tmp_path: Path) -> None:
    with ScriptedServer() as up:
        settings = 'keys = { me = "the key" }\nhost = "0.0.0.0"\n' + upstream(up.base_url)
        with serving(tmp_path, settings) as server:
            assert command(tmp_path, "health", env={"ASMODEL_PORT": str(server.port)}).returncode == 0


def test_where_nobody_answers_it_says_so_and_ends_with_1(tmp_path: Path) -> None:
    said = command(tmp_path, "health", env={"ASMODEL_PORT": "9"})
    assert said.returncode == 1
    assert said.stderr.startswith("nobody answers at 127.0.0.1:9: ")
