"""What holds for every test: no network but the loopback interface, nothing of the person's own settings or files."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# A law holds or not, however long the machine takes; a failing example is printed and reproduced from there, so no
# database of examples is left in the folder.
settings.register_profile("asmodel", deadline=None, database=None, print_blob=True)
settings.load_profile("asmodel")

# What a shell starts in the background is deaf to Ctrl-C, and so is all that it starts; some tests send just that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# ---- the network ----


class NetworkBlockedError(RuntimeError):
    """A test reached for an address that is not on this machine."""


_open_to_all = False


def _is_local(host: object) -> bool:
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or host in {"", "localhost"}:
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _open_to_all:
        return
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in {"socket.connect", "socket.sendto", "socket.sendmsg"}:
        family: int = args[0].family
        if family not in {socket.AF_INET, socket.AF_INET6} or args[1] is None:
            return  # a Unix socket, or one that is connected already
        host = args[1][0]
    else:
        return
    if not _is_local(host):
        raise NetworkBlockedError(
            f"a test reached for {host!r}; tests talk to 127.0.0.1 only (a test that truly needs more asks for it "
            "with `with network():`)"
        )


@contextmanager
def network() -> Generator[None, None, None]:
    """Let this process reach the network meanwhile: for fetching the embedded model's weights, and nothing else."""
    global _open_to_all
    before, _open_to_all = _open_to_all, True
    try:
        yield
    finally:
        _open_to_all = before


# ---- the environment ----

# Set by `make e2e` and by the fixtures below; everything else of these families is the person's own.
_KEPT = {"ASMODEL_E2E_CACHE", "ASMODEL_SOAK_MINUTES"}
# Where the embedded model's weights really are, for tests that run it.
WEIGHTS = "ASMODEL_TEST_WEIGHTS"
_OURS = ("ASMODEL_", "OTEL_", "XDG_", "LITELLM_")
# Whatever a provider's SDK would find by itself: no test may spend anyone's money.
_SECRETS = ("_API_KEY", "_API_BASE", "_BASE_URL", "_AUTH_TOKEN", "_ACCESS_KEY", "_ORG_ID", "_PROJECT_ID")
_FOLDERS = {"XDG_CACHE_HOME": "cache", "XDG_STATE_HOME": "state", "XDG_CONFIG_HOME": "config", "XDG_DATA_HOME": "data"}

_home = pytest.StashKey[Path]()


def _weights_folder() -> Path:
    """The embedded model's weights (93 MB) are the person's own: fetched once, not once for every run of the tests."""
    if given := os.environ.get(WEIGHTS):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asmodel" / "weights"


def _own_folders(home: Path) -> dict[str, str]:
    return {"HOME": str(home)} | {name: str(home / folder) for name, folder in _FOLDERS.items()}


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: child processes inherit all of this."""
    weights = _weights_folder()
    for name in list(os.environ):
        if name not in _KEPT and (name.startswith(_OURS) or name.endswith(_SECRETS)):
            del os.environ[name]
    config.stash[_home] = Path(tempfile.mkdtemp(prefix="asmodel-tests-"))
    os.environ.update(_own_folders(config.stash[_home]))
    os.environ[WEIGHTS] = str(weights)
    # A proxy of the person's own must not be asked for what is on this machine.
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "localhost,127.0.0.1,::1"
    sys.addaudithook(_watch)


def pytest_unconfigure(config: pytest.Config) -> None:
    home = config.stash.get(_home, None)
    if home is not None:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has caches, state and settings of its own, empty at its start."""
    for name, value in _own_folders(tmp_path_factory.mktemp("home")).items():
        monkeypatch.setenv(name, value)
