"""The SDKs, each in its own environment, and the servers that they ask; made when the first test wants them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from tests.e2e.environments import OPENAI_2, OPENAI_3, node, python
from tests.e2e.sdks import Script, Sdk
from tests.serving import Server, serving, upstream

PROGRAMS = Path(__file__).parent / "programs"

MAKE: dict[str, Callable[[str], Sdk]] = {
    "python-2-sync": lambda name: Sdk(name, python(*OPENAI_2), "client.py", "sync"),
    "python-2-async": lambda name: Sdk(name, python(*OPENAI_2), "client.py", "async"),
    "python-3-sync": lambda name: Sdk(name, python(*OPENAI_3), "client.py", "sync"),
    "python-3-async": lambda name: Sdk(name, python(*OPENAI_3), "client.py", "async"),
    "node": lambda name: Sdk(name, node(), "client.mjs"),
}


@pytest.fixture(scope="session", params=[*MAKE])
def sdk(request: pytest.FixtureRequest) -> Generator[Sdk]:
    """Each of the official SDKs, one after another."""
    made = MAKE[request.param](request.param)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="session")
def script() -> Generator[Script]:
    """The upstream of every server."""
    made = Script()
    with made.server:
        yield made


@pytest.fixture(scope="session")
def server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """`asmodel serve` that asks its upstream once, so that whoever asks again is the SDK."""
    settings = "\n".join(
        [
            upstream(script.server.base_url, retries=0),
            upstream(script.server.base_url, "hasty", retries=0, timeout=0.5),
            # The port of `discard`: nobody listens there.
            upstream("http://127.0.0.1:9/v1", "nobody", retries=0),
            "[limits]\nbody_bytes = 200000",
        ]
    )
    with serving(tmp_path_factory.mktemp("server"), settings, "--programs", str(PROGRAMS)) as made:
        yield made


@pytest.fixture(scope="session")
def patient_server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """`asmodel serve` as it comes: it asks its upstream again by itself."""
    with serving(tmp_path_factory.mktemp("patient"), upstream(script.server.base_url)) as made:
        yield made


@pytest.fixture(scope="session")
def locked_server(script: Script, tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """`asmodel serve` that wants a key."""
    settings = upstream(script.server.base_url, retries=0) + '[keys]\nalice = "the-key-of-alice"\n'
    with serving(tmp_path_factory.mktemp("locked"), settings) as made:
        yield made
