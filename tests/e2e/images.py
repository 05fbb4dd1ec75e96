"""The image, really built from its Containerfile, and containers of it as a kubelet would start them.

Both by what Debian packages, unpacked into a folder: buildah, and crun, the runtime. The base, which elsewhere is an
image of Python, is Debian with its Python, put together by debootstrap. It takes this machine's root; its settings for
pip are given to the build as the secret that the Containerfile asks for. Nothing is installed here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e import golang
from tests.e2e.environments import EnvironmentUnavailable
from tests.serving import PATIENCE, eventually

ROOT = Path(__file__).resolve().parent.parent.parent
SUITE = "bookworm"
"""The base's Debian, which has Python 3.11."""
MIRROR = "http://deb.debian.org/debian"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
BUILD_SECONDS = 1_200.0

TOOLS = (
    *("buildah", "golang-github-containers-common", "golang-github-containers-image", "libgpgme11", "libassuan0"),
    *("libdevmapper1.02.1", "libseccomp2", "crun", "libyajl2", "debootstrap"),
)
LIBRARIES = f"/usr/lib/{platform.machine()}-linux-gnu"


# ---- packages ----


def debian(name: str, packages: Sequence[str]) -> Path:
    """A folder in which Debian's packages are unpacked; nothing is installed. Raises EnvironmentUnavailable."""
    folder = golang.cache() / f"debian-{name}-{_digest(' '.join(packages), platform.platform())}"
    if folder.exists():
        return folder
    partial = golang.cache() / f".{os.getpid()}-{folder.name}"
    archives = partial / "archives"
    archives.mkdir(parents=True)
    try:
        for each in packages:
            _ran(["apt-get", "download", each], f"the Debian package {each}", folder=archives)
        for archive in sorted(archives.glob("*.deb")):
            _ran(["dpkg", "-x", str(archive), str(partial)], archive.name)
        shutil.rmtree(archives)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def program(name: str, path: str, packages: Sequence[str]) -> Path:
    """A program of Debian's packages that finds the libraries which this machine may not have.

    `path` is where it would be installed. Raises EnvironmentUnavailable.
    """
    folder = debian(name, [*packages, *_libraries(name, packages)])
    started = folder / f"start-{Path(path).name}"
    if not started.exists():
        partial = started.with_name(f".{os.getpid()}-{started.name}")
        # Takes its place: the process is the program's own.
        partial.write_text(
            f"""#!/bin/sh
here=$(dirname "$0")
LD_LIBRARY_PATH="$here{LIBRARIES}:$here/lib/{Path(LIBRARIES).name}" exec "$here{path}" "$@"
"""
        )
        partial.chmod(0o755)
        partial.replace(started)
    return started


def _libraries(name: str, packages: Sequence[str]) -> list[str]:
    """The packages of libraries that these want in this release, but for those that come with apt itself."""
    told = _ran(["apt-cache", "depends", *packages], f"what {name} needs")
    wanted = set(re.findall(r"^\s+Depends: (lib\S+|zlib1g)$", told, re.MULTILINE))
    return sorted(wanted - {"libc6", "libsystemd0"} - set(packages))


def _ran(
    command: Sequence[str], what: str, *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> str:
    try:
        process = subprocess.Popen(
            ["nice", "-n", "10", *command],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    except OSError as error:
        raise EnvironmentUnavailable(f"{what} could not be had: {command[0]}: {error.strerror}") from None
    try:
        output, errors = process.communicate(timeout=BUILD_SECONDS)
    except BaseException as error:
        # All of it: what installs is a process of a process.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise EnvironmentUnavailable(f"{what} was not there within {BUILD_SECONDS:g} s") from None
        raise
    if process.returncode:
        words = re.sub(r"://[^/@\s]+@", "://", (errors or output)[-1_500:])
        raise EnvironmentUnavailable(f"{what} could not be had: {command[0]} ended with {process.returncode}: {words}")
    return output


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


# ---- the base and the image ----


def base() -> Path:
    """The root of the base image. Raises EnvironmentUnavailable."""
    folder = golang.cache() / f"base-{_digest(SUITE, BASE_PACKAGES, '1', platform.platform())}"
    if folder.exists():
        return folder
    if os.geteuid():
        raise EnvironmentUnavailable("an image is built and run by root alone")
    tools = debian("tools", TOOLS)
    partial = golang.cache() / f".{os.getpid()}-{folder.name}"
    try:
        # In a namespace of its own, so that what it mounts ends with it.
        command = ["unshare", "--mount", str(tools / "usr/sbin/debootstrap"), "--variant=minbase"]
        command += [f"--include={BASE_PACKAGES}"]
        scripts = {"DEBOOTSTRAP_DIR": str(tools / "usr/share/debootstrap")}
        _ran([*command, SUITE, str(partial), MIRROR], "the base image", environment=scripts)
        # What Debian's own small images leave out too.
        for out in (
            "var/cache/apt",
            "var/lib/apt/lists",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/locale",
            "var/log",
        ):
            shutil.rmtree(partial / out, ignore_errors=True)
            (partial / out).mkdir()
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Image:
    """One that was built: its root, and what it says of how it is started."""

    root: Path
    config: Mapping[str, Any]

    @property
    def megabytes(self) -> float:
        return size(self.root)


def size(folder: Path) -> float:
    """Megabytes of the files in it, each counted once; not of the blocks of a disk."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            state = os.lstat(os.path.join(place, name))
            if (state.st_dev, state.st_ino) not in seen:
                seen.add((state.st_dev, state.st_ino))
                total += state.st_size
    return total / 1e6


def image(*, litellm: bool = True, embedded: bool = False) -> Image:
    """Built from the Containerfile with these arguments, once for what is in it. Raises EnvironmentUnavailable."""
    arguments = {"LITELLM": str(litellm).lower(), "EMBEDDED": str(embedded).lower()}
    sources = [ROOT / name for name in ("helm/Containerfile", "helm/lock.py", "requirements.lock", "pyproject.toml")]
    sources += sorted(file for room in ("proxy", "plugins", "programs") for file in (ROOT / room).rglob("*.py"))
    digests = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in sources)
    kind = f"image-{'litellm' if litellm else 'plain'}{'-embedded' if embedded else ''}"
    folder = golang.cache() / f"{kind}-{_digest(digests, json.dumps(arguments), platform.platform())}"
    if not folder.exists():
        for old in golang.cache().glob(f"{kind}-??????????"):
            shutil.rmtree(old, ignore_errors=True)
        _build(folder, arguments)
    return Image(folder / "root", json.loads((folder / "inspected.json").read_text())["OCIv1"]["config"])


_BUILD = """
set -e
mount -t overlay -o lowerdir="$TOOLS$LIBRARIES":"$TOOLS/lib/${LIBRARIES##*/}":"$LIBRARIES" overlay "$LIBRARIES"
PATH="$TOOLS/usr/bin:$PATH"
from=$(buildah from scratch)
buildah add --quiet "$from" "$BASE" /
buildah config --env PATH=/usr/local/bin:/usr/bin:/bin "$from"
buildah commit --quiet --signature-policy "$WORK/policy.json" "$from" localhost/base
buildah rm "$from"
buildah bud --pull-never --signature-policy "$WORK/policy.json" --file helm/Containerfile --tag localhost/made \
  --build-arg BASE=localhost/base "$@" .
made=$(buildah from --pull-never --signature-policy "$WORK/policy.json" localhost/made)
mkdir "$WORK/made"
cp -a "$(buildah mount "$made")" "$WORK/made/root"
buildah inspect --type image localhost/made > "$WORK/made/inspected.json"
"""


def _build(folder: Path, arguments: Mapping[str, str]) -> None:
    root = base()
    work = golang.cache() / f".{os.getpid()}-{folder.name}"
    work.mkdir()
    try:
        (work / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        # Layers over one another, where the file system can; copied whole, where it is itself made so.
        driver = (
            "vfs"
            if _ran(["stat", "-f", "-c", "%T", str(work)], "the file system").strip() == "overlayfs"
            else "overlay"
        )
        storage = f'[storage]\ndriver = "{driver}"\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n'
        (work / "storage.conf").write_text(storage)
        given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        configured = [Path("/etc/pip.conf"), Path.home() / ".config/pip/pip.conf", Path.home() / ".pip/pip.conf"]
        if secret := next((file for file in configured if file.exists()), None):
            given += ["--secret", f"id=pip,src={secret}"]
        # A package index may be vouched for by an authority that only this machine knows.
        if Path("/etc/ssl/certs").is_dir():
            given += ["--volume", "/etc/ssl/certs:/etc/ssl/certs:ro"]
        environment = {
            "TOOLS": str(debian("tools", TOOLS)),
            "LIBRARIES": LIBRARIES,
            "BASE": str(root),
            "WORK": str(work),
            "CONTAINERS_STORAGE_CONF": str(work / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }
        # In a namespace of its own: the libraries are seen by nobody else, and no mount is left behind.
        command = ["unshare", "--mount", "sh", "-c", _BUILD, "build", *given]
        _ran(command, "the image", folder=ROOT, environment=environment)
        (work / "made").replace(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


# ---- a pod ----


@dataclass(frozen=True)
class Given:
    """What a cluster would know besides the pod: by name, the entries of ConfigMaps and of Secrets."""

    config_maps: Mapping[str, Mapping[str, str]]
    secrets: Mapping[str, Mapping[str, str]]

    @classmethod
    def of(cls, objects: Sequence[Mapping[str, Any]], secrets: Mapping[str, Mapping[str, str]]) -> Given:
        """Those that were rendered, and Secrets that somebody has made by hand."""
        made = {each["metadata"]["name"]: each.get("data", {}) for each in objects if each["kind"] == "ConfigMap"}
        rendered = {
            each["metadata"]["name"]: {name: base64.b64decode(value).decode() for name, value in each["data"].items()}
            for each in objects
            if each["kind"] == "Secret"
        }
        return cls(made, {**rendered, **secrets})


class Pod:
    """The first container of a pod's template, started by crun as a kubelet would have it started.

    User, groups, environment, arguments, mounts, the read-only root and the lack of capabilities are the template's.
    The network is this machine's, and there are no cgroups, so nothing is limited.
    """

    def __init__(self, folder: Path, made: Image, template: Mapping[str, Any], given: Given, *, name: str) -> None:
        self.name = name
        self._folder = folder / name
        self._spec: Mapping[str, Any] = template["spec"]
        self._container: Mapping[str, Any] = self._spec["containers"][0]
        self._image = made
        self._given = given
        self._process: subprocess.Popen[bytes] | None = None
        self.port: int = self._container["ports"][0]["containerPort"] if "ports" in self._container else 0
        self.grace: float = self._spec.get("terminationGracePeriodSeconds", 30)
        self.pre_stop: float = (
            self._container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        )

    def start(self) -> Pod:
        self._folder.mkdir(parents=True)
        (self._folder / "config.json").write_text(json.dumps(self._config()))
        command = self._crun("run", "--bundle", str(self._folder), "--pid-file", str(self._folder / "pid"), self.name)
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "LD_LIBRARY_PATH": f"{debian('tools', TOOLS)}{LIBRARIES}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command beside the server, in its container, as `kubectl exec` and the health check of an image do it."""
        user = self._spec["securityContext"]
        return subprocess.run(
            self._crun("exec", "--user", f"{user['runAsUser']}:{user['runAsGroup']}", self.name, *words),
            env={**os.environ, "LD_LIBRARY_PATH": f"{debian('tools', TOOLS)}{LIBRARIES}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def _crun(self, *words: str) -> list[str]:
        # crun looks at cgroups even where it is told to make none, and does not like all arrangements of them.
        script = 'mount -t tmpfs tmpfs /sys/fs/cgroup && exec "$0" "$@"'
        crun = [str(debian("tools", TOOLS) / "usr/bin/crun"), "--root", str(self._folder / "state")]
        return ["unshare", "--mount", "sh", "-c", script, *crun, "--cgroup-manager=disabled", *words]

    @property
    def said(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        """Of the server, as this machine counts; to itself it is 1."""
        return int(eventually(f"{self.name} runs", lambda: self._pid()))

    def _pid(self) -> str:
        assert self._process is not None
        assert self._process.poll() is None, f"{self.name} ended with {self._process.returncode}:\n{self.said}"
        file = self._folder / "pid"
        return file.read_text() if file.exists() else ""

    def volume(self, name: str) -> Path:
        return self._folder / "volumes" / name

    def status(self) -> Mapping[str, str]:
        """What the kernel says of the server's process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return dict(re.split(r":\s+", line, maxsplit=1) for line in lines if ":" in line)

    def wait(self, seconds: float) -> int:
        assert self._process is not None
        return self._process.wait(seconds)

    @property
    def ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def terminate(self) -> tuple[int, float]:
        """As a kubelet ends a pod: what is to be done before, the signal, and death when the grace is over.

        Gives the exit code, and the seconds from the signal to the end. Fails where the grace was not enough.
        """
        began = time.monotonic()
        time.sleep(self.pre_stop)
        signalled = time.monotonic()
        os.kill(self.pid, 15)
        try:
            code = self.wait(self.grace - (signalled - began))
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within its grace of {self.grace:g} s") from None
        return code, time.monotonic() - signalled

    def kill(self) -> None:
        if not self.ended:
            assert self._process is not None
            if pid := self._pid():
                os.kill(int(pid), 9)
            else:
                self._process.kill()
            self.wait(PATIENCE)

    def __enter__(self) -> Pod:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.kill()

    # -- what a kubelet makes of a pod

    def _config(self) -> dict[str, Any]:
        security = {**self._spec["securityContext"], **self._container["securityContext"]}
        assert security["capabilities"] == {"drop": ["ALL"]}
        group = security["fsGroup"]
        config = self._image.config
        command: list[str] = self._container.get("command") or config.get("Entrypoint", [])
        arguments: list[str] = self._container.get("args") or (
            [] if "command" in self._container else config.get("Cmd", [])
        )
        environment = self._environment()
        none: list[str] = []
        mounts: list[dict[str, Any]] = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "nodev", "mode=1777"]},
        ]
        volumes = {each["name"]: each for each in self._spec["volumes"]} if "volumes" in self._spec else {}
        for mount in self._container.get("volumeMounts", ()):
            source = self._volume(volumes[mount["name"]], group)
            options = ["rbind", "ro" if mount.get("readOnly") else "rw"]
            mounts.append(
                {"destination": mount["mountPath"], "type": "bind", "source": str(source), "options": options}
            )
        return {
            "ociVersion": "1.0.2",
            "root": {"path": str(self._image.root), "readonly": security["readOnlyRootFilesystem"]},
            "hostname": self.name,
            "process": {
                "terminal": False,
                "user": {"uid": security["runAsUser"], "gid": security["runAsGroup"], "additionalGids": [group]},
                "args": [*command, *arguments],
                "cwd": config.get("WorkingDir") or "/",
                "env": [f"{name}={value}" for name, value in environment.items()],
                "noNewPrivileges": not security["allowPrivilegeEscalation"],
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted", "inheritable", "ambient"), none),
            },
            "mounts": mounts,
            "linux": {"namespaces": [{"type": each} for each in ("pid", "mount", "ipc", "uts")]},
        }

    def _environment(self) -> dict[str, str]:
        found = dict(line.split("=", 1) for line in self._image.config.get("Env", ()))
        for source in self._container.get("envFrom", ()):
            found |= self._given.secrets[source["secretRef"]["name"]]
        fields = {"metadata.name": self.name, "metadata.namespace": "models", "spec.nodeName": "here"}
        for each in self._container["env"]:
            source = each.get("valueFrom", {})
            if "secretKeyRef" in source:
                value = self._given.secrets[source["secretKeyRef"]["name"]][source["secretKeyRef"]["key"]]
            elif "fieldRef" in source:
                value = fields[source["fieldRef"]["fieldPath"]]
            else:
                value = re.sub(r"\$\(([A-Za-z_]\w*)\)", lambda m: found[m[1]], each.get("value", ""))
            found[each["name"]] = value
        return found

    def _volume(self, volume: Mapping[str, Any], group: int) -> Path:
        folder = self.volume(volume["name"])
        folder.mkdir(parents=True, exist_ok=True)
        if "configMap" in volume:
            # Each file is a link into a dated folder, which one link names.
            dated = folder / "..2026_01_01"
            dated.mkdir()
            (folder / "..data").symlink_to(dated.name)
            for name, text in self._given.config_maps[volume["configMap"]["name"]].items():
                (dated / name).write_text(text)
                (folder / name).symlink_to(f"..data/{name}")
        else:
            os.chown(folder, 0, group)
            folder.chmod(0o2777)
        return folder
