"""Other proxies, measured beside ours: each in an environment of its own, as a real process, at the same upstream.

Environments are kept in `$ASMODEL_BENCH_CACHE`, by default `.cache/bench` of the checkout, and found there by the next
run. They are made by `uv` where there is one, else by `venv` and `pip`, from the index that the person has set up.
Each peer is run as its own manual has it for one worker, without a database and without keys.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tests.bench import wire
from tests.bench.processes import (
    ROOT,
    DidNotStart,
    free_port,
    last_words,
    own_environment,
    start,
    stop,
    until_it_answers,
    uv,
)
from tests.bench.targets import Target

CACHE = "ASMODEL_BENCH_CACHE"
INSTALL_PATIENCE = 900.0
"""Seconds that an installation may take."""
START_PATIENCE = 120.0
"""Seconds that a peer may take to start."""


class PeerUnavailable(RuntimeError):
    """A peer cannot be measured here; says why."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a peer is started, and where it is then asked."""

    command: Sequence[str | Path]
    port: int
    """0 if it chooses one itself; then `address` says which."""
    health: str | None
    """What answers once it is ready; None if saying its address is enough."""
    model: str
    path: str = "/v1/chat/completions"
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    address: Path | None = None
    """A file in which its base URL will stand."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What is installed, and how it is started: from where it is installed, a folder and the upstream's base URL."""

    name: str
    package: str
    requirements: tuple[str, ...]
    start: Callable[[Path, Path, str], Way]
    streams_whole: bool = False
    """Whether it asks the upstream for a whole answer where it is asked for a stream."""
    alone: tuple[str, ...] = ()
    """Installed without what they ask for: what they need here is among the requirements."""


def _litellm(environment: Path, folder: Path, base_url: str) -> Way:
    settings = folder / "litellm.yaml"
    player = {"model": f"openai/{wire.MODEL}", "api_base": base_url, "api_key": "unused"}
    # JSON is YAML, too.
    settings.write_text(json.dumps({"model_list": [{"model_name": wire.MODEL, "litellm_params": player}]}))
    port = free_port()
    command: list[str | Path] = [environment / "bin" / "litellm"]
    command += ["--config", settings, "--host", "127.0.0.1", "--port", str(port)]
    more = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
    return Way(command=command, port=port, health="/health/liveliness", model=wire.MODEL, environment=more)


def _optillm(environment: Path, folder: Path, base_url: str) -> Way:
    port = free_port()
    command: list[str | Path] = [environment / "bin" / "optillm"]
    command += ["--approach", "none", "--base-url", base_url, "--host", "127.0.0.1", "--port", str(port)]
    return Way(command=command, port=port, health="/health", model=wire.MODEL, environment={"OPENAI_API_KEY": "unused"})


def _tensorzero(environment: Path, folder: Path, base_url: str) -> Way:
    settings, address = folder / "tensorzero.toml", folder / "address"
    settings.write_text(
        f"""[gateway]
observability.enabled = false

[models.{wire.MODEL}]
routing = ["upstream"]

[models.{wire.MODEL}.providers.upstream]
type = "openai"
model_name = "{wire.MODEL}"
api_base = "{base_url}/"
api_key_location = "none"
"""
    )
    script = Path(__file__).with_name("tensorzero_gateway.py")
    return Way(
        command=[environment / "bin" / "python", script, settings, address],
        port=0,
        health=None,
        model=f"tensorzero::model_name::{wire.MODEL}",
        address=address,
    )


def _relay(environment: Path, folder: Path, base_url: str) -> Way:
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.relay", "--port", str(port), "--to", base_url]
    return Way(command=command, port=port, health="/v1/models", model=wire.MODEL, environment={"PYTHONPATH": str(ROOT)})


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        # Two releases of litellm carried malware.
        Peer(
            name="litellm",
            package="litellm",
            requirements=("litellm[proxy]>=1.100,!=1.82.7,!=1.82.8",),
            start=_litellm,
        ),
        # It asks for torch and a hundred more, for what it is not asked here.
        Peer(
            name="optillm",
            package="optillm",
            requirements=(
                "litellm>=1.100,!=1.82.7,!=1.82.8",
                *("aiohttp", "azure-identity", "cerebras-cloud-sdk", "flask", "math-verify", "networkx", "numpy"),
                *("openai", "pyyaml", "requests", "sympy", "tiktoken", "z3-solver"),
            ),
            alone=("optillm>=0.4",),
            start=_optillm,
            streams_whole=True,
        ),
        Peer(
            name="tensorzero",
            package="tensorzero",
            requirements=("tensorzero>=2026.6", "openai"),
            start=_tensorzero,
        ),
        Peer(name="relay", package="", requirements=(), start=_relay),
    )
}


class RunningPeer(Target):
    """A peer that runs."""

    def __init__(self, peer: Peer, folder: Path, base_url: str, say: Callable[[str], None]) -> None:
        environment, self.version = installed(peer, say)
        folder.mkdir(parents=True)
        way = peer.start(environment, folder, base_url)
        log = folder / f"{peer.name}.log"
        process = start(way.command, folder, log=log.name, environment=own_environment(folder, way.environment))
        super().__init__(peer.name, way.port, way.model, "whole", "stream", process=process)
        self.path = way.path
        self.streams_whole = peer.streams_whole
        try:
            if way.address is not None:
                address = urlsplit(_said(way.address, process, log))
                self.port, self.path = address.port or 0, f"{address.path.rstrip('/')}/chat/completions"
            if way.health is not None:
                until_it_answers(process, self.port, way.health, log, START_PATIENCE)
        except DidNotStart as error:
            stop(process)
            raise PeerUnavailable(str(error)) from None
        except BaseException:
            stop(process)
            raise


def _said(file: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_PATIENCE
    while not file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise DidNotStart(f"it did not say where it listens: {last_words(log)}")
        time.sleep(0.02)
    return file.read_text().strip()


def installed(peer: Peer, say: Callable[[str], None]) -> tuple[Path, str]:
    """The environment of a peer, made if it is not there, and the peer's version. Raises PeerUnavailable."""
    if not peer.package:
        return Path(), ""
    key = json.dumps([peer.requirements, peer.alone, sys.version, platform.platform()])
    cache = Path(os.environ.get(CACHE) or ROOT / ".cache" / "bench").absolute()
    folder = cache / f"{peer.name}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    ready = folder / "ready"
    if not ready.exists():
        say(f"installing {peer.name} (once; kept in {cache})")
        shutil.rmtree(folder, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        _install(folder, peer)
        ready.write_text(_version(folder, peer.package))
    return folder, ready.read_text()


def _install(folder: Path, peer: Peer) -> None:
    python = folder / "bin" / "python"
    found = uv()
    if found is not None:
        _run([found, "venv", "--quiet", "--no-project", "--python", sys.executable, str(folder)])
        installer = [found, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
    else:
        _run([sys.executable, "-m", "venv", str(folder)])
        installer = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-input"]
    try:
        _run([*installer, *peer.requirements])
    except PeerUnavailable:
        if found is None:
            raise
        # Some releases ask for exact versions of their own parts that an index need not have: any will do here.
        overrides = folder / "overrides.txt"
        overrides.write_text("certifi\nlitellm-proxy-extras\nlitellm-enterprise\n")
        _run([*installer, "--override", str(overrides), *peer.requirements])
    if peer.alone:
        _run([*installer, "--no-deps", *peer.alone])


def _version(folder: Path, package: str) -> str:
    code = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    return _run([str(folder / "bin" / "python"), "-c", code, package]).strip()


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=INSTALL_PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"{Path(command[0]).name}: {error}") from None
    if done.returncode:
        # An index's address may hold a password.
        words = re.sub(r"://[^/@\s]+@", "://", " ".join((done.stderr or done.stdout).split()))[-600:]
        raise PeerUnavailable(f"{Path(command[0]).name} ended with {done.returncode}: {words}")
    return done.stdout
