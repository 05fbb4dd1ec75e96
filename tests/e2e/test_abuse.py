"""What no client should send: a 4xx or a closed connection each, and a server that is none the worse for it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.serving import Server, eventually, serving, upstream

from asmodel.testing import ScriptedServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

HELLO: dict[str, Any] = {"model": "plain", "messages": [{"role": "user", "content": "hello"}]}
FLAT = 60_000_000
"""Bytes that the server may have grown by: what one body of the largest size takes, and its JSON."""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ScriptedServer() as up, serving(tmp_path_factory.mktemp("abuse"), upstream(up.base_url)) as made:
        # What the first requests bring in is no growth.
        for stream in (False, True):
            assert made.chat({**HELLO, "stream": stream}).status == 200
        yield made


@pytest.fixture(autouse=True)
def unharmed(server: Server) -> Iterator[None]:
    """After each of these the server answers as before, and has not grown."""
    before = resident(server)
    yield
    began = time.monotonic()
    assert server.chat(HELLO).status == 200
    assert time.monotonic() - began < 5
    assert "Traceback" not in server.said
    grown = resident(server) - before
    assert grown < FLAT, f"it has grown by {grown / 1e6:.0f} MB"


def resident(server: Server) -> int:
    """Bytes of memory that the server holds; 0 where the system does not tell."""
    try:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    except OSError:
        return 0
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def closed(sock: socket.socket) -> bytes:
    """All that is said until the connection is closed, in whatever way."""
    said = b""
    with suppress(ConnectionError):
        while part := sock.recv(65536):
            said += part
    return said


def refused(said: bytes, *statuses: int) -> None:
    """In the envelope, if anything was heard before the connection was closed."""
    if not said:
        return
    head, _, body = said.partition(b"\r\n\r\n")
    assert int(head.split()[1]) in statuses, head
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


DEEP = b'{"a":' * 500 + b"1" + b"}" * 500
CHAT = b'{"model":"plain","messages":[{"role":"user","content":"x"}],%s}'

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "white space": b" " * 1000,
    "half an object": b'{"model": "plain", "messages": [',
    "a comma too many": b'{"model": "plain", "messages": [],}',
    "two objects": b"{}{}",
    "a number": b"7",
    "NaN": CHAT % b'"temperature": NaN',
    "no UTF-8": CHAT % b'"user": "\xff\xfe"',
    "half a surrogate pair": CHAT % b'"user": "\\ud800"',
    "UTF-16": json.dumps(HELLO).encode("utf-16"),
    "a zero byte": CHAT % b'"user": "\x00"',
    "a huge number": CHAT % b'"temperature": 1e400',
    "a huge whole number": CHAT % (b'"seed": ' + b"9" * 100_000),
    "a huge n": CHAT % b'"n": 1000000000000000000000',
    "a negative limit": CHAT % b'"asmodel": {"limits": {"calls": -1}}',
    "an endless limit": CHAT % b'"asmodel": {"limits": {"seconds": 1e999}}',
    "deep objects": DEEP,
    "deep lists": b"[" * 1_000_000,
    "a deep schema": CHAT % (b'"response_format": ' + DEEP),
    "a deep message": b'{"model":"plain","messages":' + b"[" * 90 + b"]" * 90 + b"}",
    "messages that are none": b'{"model":"plain","messages":{"role":"user"}}',
    "a million messages": b'{"model":"plain","messages":[' + b"{}," * 1_000_000 + b"{}]}",
    "a million parts": b'{"model":"plain","messages":[{"role":"user","content":[' + b"{}," * 1_000_000 + b"{}]}]}",
    "a model that is a list": b'{"model":["plain"],"messages":[{"role":"user","content":"x"}]}',
    "a model of a megabyte": b'{"model":"' + b"x" * 1_000_000 + b'","messages":[{"role":"user","content":"x"}]}',
    "text for a switch": CHAT % b'"stream": "true"',
    "tools that are none": CHAT % b'"tools": [[]]',
    "a tool without a name": CHAT % b'"tools": [{"type": "function", "function": {}}]',
    "a schema that is none": CHAT % b'"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}',
    "a schema of another machine": CHAT
    % b'"response_format":{"type":"json_schema","json_schema":{"schema":{"$ref":"http://127.0.0.1:9/x"}}}',
    "strange names": CHAT % b'"asmodel": {"__class__": 1}',
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_that_makes_no_sense_is_refused_for_good(what: str, server: Server) -> None:
    began = time.monotonic()
    answer = server.chat(BODIES[what])
    assert answer.status in (400, 404, 413), answer.body[:200]
    assert answer.error["message"]
    assert len(answer.body) < 5_000
    assert answer.headers["x-should-retry"] == "false"
    assert time.monotonic() - began < 10


def test_bodies_of_fifty_megabytes_are_refused_and_leave_nothing_behind(server: Server) -> None:
    before = resident(server)
    for _ in range(4):
        answer = server.chat(b'{"model": "plain", "filler": "' + b"x" * 50_000_000 + b'"}')
        assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
        assert answer.headers["x-should-retry"] == "false"
    assert resident(server) - before < FLAT


def test_a_body_that_never_ends_is_cut_off(server: Server) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    sent = 0
    with connected(server) as sock:
        sock.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        with suppress(OSError):
            while sent < 1_000_000_000:
                sock.sendall(chunk)
                sent += len(chunk)
        assert sent < 300_000_000, "nobody wanted it"
        refused(closed(sock), 413)


def test_a_body_that_goes_on_after_its_answer_is_cut_off(server: Server) -> None:
    """As where it was refused by its head, before a byte of it was read."""
    sent = 0
    with connected(server) as sock:
        sock.sendall(HEAD.replace(b"127.0.0.1", b"evil.example") + b"content-length: 99999999999\r\n\r\n")
        with suppress(OSError):
            while sent < 1_000_000_000:
                sock.sendall(b"x" * 0x10000)
                sent += 0x10000
        assert sent < 300_000_000


@pytest.mark.parametrize("line", [b"x-filler: " + b"x" * 0x10000, b"x"], ids=["long", "many"])
def test_headers_that_never_end_are_cut_off(line: bytes, server: Server) -> None:
    sent = 0
    with connected(server) as sock:
        sock.sendall(HEAD + (line if len(line) > 1 else b""))
        with suppress(OSError):
            while sent < 100_000_000:
                flood = line if len(line) > 1 else b"".join(b"x-%d: 1\r\n" % n for n in range(1000))
                sock.sendall(flood)
                sent += len(flood)
        assert sent < 50_000_000
        refused(closed(sock), 431)


def test_headers_that_are_too_many_or_too_long_are_told_so(server: Server) -> None:
    for flood in (b"".join(b"x-%d: 1\r\n" % n for n in range(500)), b"x-filler: " + b"x" * 100_000):
        with connected(server) as sock:
            sock.sendall(HEAD + flood)
            said = closed(sock)
            assert said.startswith(b"HTTP/1.1 431 ")
            refused(said, 431)


GARBAGE = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    "zero bytes": bytes(10_000),
    "an unknown method": b"BREW / HTTP/1.1\r\n\r\n",
    "a line without an end": b"GET /" + b"x" * 300_000,
    "a header without a name": HEAD + b": x\r\n\r\n",
    "a length that is none": HEAD + b"content-length: many\r\n\r\n",
    "a negative length": HEAD + b"content-length: -5\r\n\r\n",
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 7\r\n\r\nhello",
    "a length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk of no size": HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    "a chunk of all sizes": HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("what", GARBAGE)
def test_what_is_no_http_is_refused_or_the_connection_closed(what: str, server: Server) -> None:
    with connected(server) as sock:
        with suppress(OSError):
            sock.sendall(GARBAGE[what])
            sock.shutdown(socket.SHUT_WR)
        refused(closed(sock), 400, 405, 431)


def test_connections_that_say_nothing_are_closed_in_the_end_and_hold_up_nobody(server: Server) -> None:
    said = {
        "nothing": b"",
        "half a line": b"POST /v1/cha",
        "half a head": HEAD,
        "half a body": HEAD + b'content-length: 1000\r\n\r\n{"model": ',
        "half a chunk": HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{",
    }
    with ExitStack() as stack:
        waiting = {(what, n): stack.enter_context(connected(server)) for what in said for n in range(40)}
        for (what, _), sock in waiting.items():
            sock.sendall(said[what])
        began = time.monotonic()
        for _ in range(20):
            assert server.chat(HELLO).status == 200
        assert time.monotonic() - began < 10
        heard: dict[str, set[bytes]] = {what: set() for what in said}
        for (what, _), sock in waiting.items():
            sock.settimeout(60)
            words = closed(sock)
            refused(words, 408)
            heard[what].add(words.partition(b"\r\n")[0])
        assert 20 < time.monotonic() - began < 60
    timeout = b"HTTP/1.1 408 Request Timeout"
    assert heard == {what: {b""} if what == "nothing" else {timeout} for what in said}


def test_clients_that_leave_at_any_moment_disturb_nobody(server: Server) -> None:
    whole = HEAD + b"content-length: %d\r\n\r\n" % len(json.dumps(HELLO)) + json.dumps(HELLO).encode()
    for cut in range(0, len(whole) + 1, 7):
        with connected(server) as sock:
            sock.sendall(whole[:cut])
    eventually("all of them are forgotten", lambda: open_connections(server) < 20)


def open_connections(server: Server) -> int:
    folder = Path(f"/proc/{server.process.pid}/fd")
    try:
        links = [str(link.readlink()) for link in folder.iterdir()]
    except OSError:
        return 0
    return sum(link.startswith("socket:") for link in links)


def test_many_requests_in_one_packet_are_each_answered(server: Server) -> None:
    one = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with connected(server) as sock:
        sock.sendall(one * 300 + one.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert closed(sock).count(b"HTTP/1.1 200 OK") == 301


def test_a_connection_serves_one_request_after_another_and_line_ends_between_them_are_nothing(server: Server) -> None:
    data = json.dumps(HELLO).encode()
    whole = HEAD + b"content-length: %d\r\n\r\n" % len(data) + data
    with connected(server) as sock:
        for _ in range(3):
            sock.sendall(whole + b"\r\n")
            said = b""
            while b'"ignored":[]}}' not in said:
                part = sock.recv(1 << 20)
                assert part
                said += part
            assert said.startswith(b"HTTP/1.1 200 ")
        sock.sendall(whole * 5)
        sock.sendall(b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert closed(sock).count(b"HTTP/1.1 200 ") == 5


def test_a_name_of_any_characters_is_not_found_and_not_believed(server: Server) -> None:
    for name in ("../../etc/passwd", "\r\nSet-Cookie: a=b", "<script>", "\u202e", "plain:" * 40):
        answer = server.chat({**HELLO, "model": name})
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert "set-cookie" not in answer.headers
    assert "\nSet-Cookie" not in server.said
    for name in ("a" * 100_000, "plain:" * 1000, "plain:" * 1000 + "default"):
        answer = server.chat({**HELLO, "model": name})
        assert (answer.status, answer.error["param"]) == (400, "model")
        answer = server.chat({**HELLO, "asmodel": {"roles": {"default": name}}})
        assert (answer.status, answer.error["param"]) == (400, "asmodel.roles.default")
    assert server.ask("GET", "/v1/models/" + "plain:" * 1000).status == 404
