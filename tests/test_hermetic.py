"""Tests reach nothing but this machine, and find none of the settings, keys and files of the person who runs them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Set aside for documentation (RFC 5737, RFC 3849): never anyone's, so that a hole in the guard would harm no one.
ELSEWHERE = ["192.0.2.1", "2001:db8::1"]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_an_address_elsewhere_is_refused_before_anything_is_sent(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as stream, pytest.raises(RuntimeError, match="reached for"):
        stream.connect((host, 443))
    with socket.socket(family, socket.SOCK_DGRAM) as datagrams, pytest.raises(RuntimeError, match="reached for"):
        datagrams.sendto(b"", (host, 53))


def test_a_name_elsewhere_is_not_looked_up() -> None:
    with pytest.raises(RuntimeError, match=r"reached for 'example\.invalid'"):
        socket.getaddrinfo("example.invalid", 443)


async def test_an_event_loop_is_held_to_the_same() -> None:
    with pytest.raises(RuntimeError, match="reached for"):
        await asyncio.open_connection(ELSEWHERE[0], 443)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_this_machine_is_reached(host: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4))
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(host, server.sockets[0].getsockname()[1])
        writer.write(b"here")
        assert await reader.read() == b"here"
        writer.close()
        await writer.wait_closed()


def test_a_test_finds_none_of_the_persons_own_settings_and_keys() -> None:
    code = "import os; print(*(n for n in os.environ if n.startswith(('ASMODEL_', 'OTEL_')) or n.endswith('_API_KEY')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert set(done.stdout.split()) <= {"ASMODEL_E2E_CACHE", "ASMODEL_TEST_WEIGHTS"}


def test_each_test_has_folders_of_its_own() -> None:
    home = Path.home()
    assert list(home.iterdir()) == []
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        assert Path(os.environ[name]).parent == home
