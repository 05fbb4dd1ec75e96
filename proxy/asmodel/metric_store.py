"""Where metrics are kept: numbers in a memory map, one for each process, that any process of the server can add up.

A server with several workers gives them a folder, and each worker's map is a file in it. Recording stays what it is
without the folder, an addition in memory: no call to the system, no lock, nothing to flush, and nothing lost when the
process is killed, since the pages belong to the file. A reader opens the files and adds them up.

Who is alive is told by a lock (`flock`) that each process holds on its file and the system takes back when it ends. A
worker that starts goes on with the file of one that has ended, so that counters never go down and there are never more
files than there were workers at once. Gauges count only while their process lives.

    file     MAGIC, bytes used (u64), process id (u64), 8 bytes spare; then series, one after the other
    series   bytes of the key (u32), how many doubles (u32); the key, `["name", ["label", …]]` in JSON, filled up with
             spaces to a multiple of 8; the doubles: one of a counter or gauge; of a histogram its buckets and its sum
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import secrets
import shutil
import struct
import tempfile
import threading
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

FOLDER = "ASMODEL_METRICS_FOLDER"
"""How a worker learns where the server's processes keep their metrics."""

CAPACITY = 1 << 20
"""Bytes of one process's map. A histogram of 14 buckets with long labels takes about 300, a counter about 100."""

SERIES = 1_000
"""Label sets of one family; whatever comes after is counted together, under OTHER."""

OTHER = "other"
"""The label of everything that has no label of its own."""

LONGEST = 100
"""Characters of a label's value."""

_MAGIC = b"asmodel1"
_HEADER = 32
_SUFFIX = ".metrics"

Labels: TypeAlias = tuple[str, ...]
Series: TypeAlias = tuple[str, Labels]

log = logging.getLogger("asmodel.metrics")


@dataclass(frozen=True, slots=True)
class Family:
    """All series of one name. `name`, `unit` and `labels` are OpenTelemetry's; `exposed` is Prometheus's name."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""
    """`s`, `By`, or a word in braces."""
    bounds: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, themselves included; the last bucket, without a bound, is not listed."""
    prometheus: str = ""
    """Prometheus's own word for it, where it has one."""

    @property
    def exposed(self) -> str:
        if self.prometheus:
            return self.prometheus
        unit = {"s": "_seconds", "By": "_bytes"}.get(self.unit, "")
        return self.name.replace(".", "_") + unit + ("_total" if self.kind == "counter" else "")

    @property
    def width(self) -> int:
        """How many doubles a series is made of."""
        return len(self.bounds) + 2 if self.kind == "histogram" else 1


class Numbers:
    """The series of this process, and those of the others in the folder.

    Raises OSError where the folder cannot be used or has no room left.
    """

    def __init__(self, folder: Path | None = None, *, capacity: int = CAPACITY) -> None:
        self.folder = folder
        self.path: Path | None = None
        self._fd = -1
        self._index: dict[Series, tuple[int, int]] = {}
        """Where among the doubles a series begins, and how many it has."""
        self._before: dict[Series, Sequence[float]] = {}
        """What was counted by the ended process whose file this is now."""
        self._lock = threading.Lock()
        if folder is None:
            self._map = mmap.mmap(-1, capacity)
        else:
            self._fd, self.path = _claimed(folder, capacity)
            try:
                self._map = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
            except BaseException:
                os.close(self._fd)
                raise
        self.values = memoryview(self._map).cast("d")
        """All doubles of the map; a series begins where `find` says."""
        if self._map[:8] == _MAGIC:
            for name, labels, at, width in _entries(self._map, self._used):
                self._index[name, labels] = at, width
                self._before[name, labels] = self.values[at : at + width].tolist()
        else:
            struct.pack_into("=8sQQQ", self._map, 0, _MAGIC, _HEADER, 0, 0)
        struct.pack_into("=Q", self._map, 16, os.getpid())

    @property
    def _used(self) -> int:
        return int(struct.unpack_from("=Q", self._map, 8)[0])

    def find(self, family: Family, labels: Labels) -> int | None:
        """The place in `values` of a series, which is made if it is new; None where there is no room for it."""
        series = (family.name, labels)
        with self._lock:
            place = self._index.get(series)
            return self._made(series, family.width) if place is None else place[0]

    def _made(self, series: Series, width: int) -> int | None:
        key = json.dumps(series, separators=(",", ":")).encode()
        key += b" " * (-len(key) % 8)
        begin = self._used
        doubles = begin + 8 + len(key)
        end = doubles + 8 * width
        if end > len(self._map):
            return None
        self._map[begin:doubles] = struct.pack("=II", len(key), width) + key
        # Last, so that a reader never meets half an entry.
        struct.pack_into("=Q", self._map, 8, end)
        self._index[series] = doubles // 8, width
        return doubles // 8

    def forget(self, family: Family) -> None:
        """Set to 0 what an ended process left behind of a gauge."""
        for (name, _), (at, width) in self._index.items():
            if name == family.name:
                self.values[at : at + width] = memoryview(bytes(8 * width)).cast("d")

    def before(self, family: Family, labels: Labels) -> float:
        """What an ended process had counted in this series before its file became this one's."""
        return next(iter(self._before.get((family.name, labels), ())), 0.0)

    def own(self) -> Iterator[tuple[str, Labels, Sequence[float]]]:
        """What this process has counted itself, by name and labels."""
        with self._lock:
            index = list(self._index.items())
        for (name, labels), (at, width) in index:
            now = self.values[at : at + width].tolist()
            before = self._before.get((name, labels))
            yield name, labels, now if before is None else [a - b for a, b in zip(now, before, strict=True)]

    def total(self, gauges: frozenset[str]) -> dict[str, dict[Labels, Sequence[float]]]:
        """The sums over all processes by name and labels; `gauges` are the names that count only of the living."""
        sums: dict[str, dict[Labels, Sequence[float]]] = {}

        def add(data: bytes, skipped: frozenset[str]) -> None:
            values = memoryview(data[: len(data) // 8 * 8]).cast("d")
            for name, labels, at, width in _entries(data, len(data)):
                if name in skipped:
                    continue
                mine = values[at : at + width].tolist()
                sum_ = sums.setdefault(name, {}).get(labels)
                if sum_ is None or len(sum_) != width:
                    sums[name][labels] = mine
                else:
                    sums[name][labels] = [a + b for a, b in zip(sum_, mine, strict=True)]

        with self._lock:
            mine = bytes(self._map[: self._used])
        add(mine, frozenset())
        for path in _files(self.folder):
            if path != self.path and (read := _read(path)) is not None:
                data, alive = read
                add(data, frozenset() if alive else gauges)
        return sums

    def close(self) -> None:
        """Let go of the file, for whoever goes on with it. The map stays: a task that ends late still adds to it."""
        if self._fd >= 0:
            import fcntl

            # In so many words, because the map holds a duplicate of the descriptor, and that the lock.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1


def _entries(data: bytes | mmap.mmap, used: int) -> Iterator[tuple[str, Labels, int, int]]:
    """Name, labels, place among the doubles, and how many, of each series."""
    at = _HEADER
    while at + 8 <= used:
        length, width = struct.unpack_from("=II", data, at)
        doubles = at + 8 + length
        name, labels = json.loads(data[at + 8 : doubles])
        yield name, tuple(labels), doubles // 8, width
        at = doubles + 8 * width


def _files(folder: Path | None) -> list[Path]:
    return [] if folder is None else sorted(folder.glob(f"*{_SUFFIX}"))


def _read(path: Path) -> tuple[bytes, bool] | None:
    """Another process's series, and whether it lives; None where the file has gone meanwhile, or is none of ours."""
    import fcntl

    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
            if header[:8] != _MAGIC:
                return None
            (used,) = struct.unpack_from("=Q", header, 8)
            data = header + file.read(used - _HEADER)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return data, True
            return data, False
    except FileNotFoundError:
        return None


def _claimed(folder: Path, capacity: int) -> tuple[int, Path]:
    """A file of the folder that is this process's alone until it ends: one that was left, or a new one."""
    import fcntl

    stat = folder.stat()
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o077:
        raise PermissionError(f"{folder} should be this user's own and closed to others (0700)")
    for path in _files(folder):
        fd = -1
        with suppress(BlockingIOError, FileNotFoundError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.pread(fd, 8, 0) == _MAGIC:
                return fd, path
        if fd >= 0:
            os.close(fd)
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Written, not only made long: a disk that is full says so here, and not by SIGBUS at some later addition.
        os.pwrite(fd, bytes(capacity), 0)
        if os.fstat(fd).st_size != capacity:
            raise OSError(f"{folder} has no room for {capacity} bytes")
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.pwrite(fd, struct.pack("=8sQQQ", _MAGIC, _HEADER, os.getpid(), 0), 0)
        # Only now under a name that others read: a file with that name and no lock on it has lost its process.
        new.rename(path)
    except BaseException:
        os.close(fd)
        new.unlink(missing_ok=True)
        raise
    return fd, path


@contextmanager
def shared_folder() -> Generator[dict[str, str], None, None]:
    """A folder for the metrics of the processes started in the body; gives the variables by which they find it.

    In `$XDG_RUNTIME_DIR` (XDG base directory specification, version 0.8) where there is one, else among the temporary
    files. It is closed to others, locked against cleaners of temporary files (tmpfiles.d(5)), and removed afterwards.
    """
    import fcntl

    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    base = runtime if runtime.is_absolute() and os.access(runtime, os.W_OK) else None
    folder = tempfile.mkdtemp(prefix="asmodel-metrics-", dir=base)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield {FOLDER: folder}
    finally:
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)


class Names:
    """The values that one label may take: those that are known, and as many others as there is `room` for."""

    def __init__(self, known: Sequence[str] = (), *, room: int = 0) -> None:
        self._known = {"", *known}
        self._room = room

    def add(self, *names: str) -> None:
        self._known.update(names)

    def admitted(self, name: str) -> str:
        """The name as a label, or OTHER."""
        name = name[:LONGEST]
        if name in self._known:
            return name
        if self._room > 0:
            self._room -= 1
            self._known.add(name)
            return name
        return OTHER


class Instrument:
    """One family as it is recorded. Everything but `put` is for the thread of the event loop: additions are not atomic.

    A label that is not known costs a second look each time, and no memory.
    """

    def __init__(self, numbers: Numbers, family: Family, names: Sequence[Names]) -> None:
        self.family = family
        self._numbers = numbers
        self._values = numbers.values
        self._names = names
        self._slots: dict[Labels, int] = {}
        self._bounds = family.bounds
        self._sum = len(family.bounds) + 1
        if family.kind == "gauge":
            numbers.forget(family)
        # Made first, so that there is room for it whatever comes.
        other = numbers.find(family, (OTHER,) * len(family.labels))
        if other is None:
            raise ValueError("the map is too small for the families themselves")
        self._other = other
        if not family.labels:
            self._slots[()] = other

    def _find(self, labels: Labels) -> int:
        clean = tuple(names.admitted(value) for names, value in zip(self._names, labels, strict=True))
        slot = self._slots.get(clean)
        if slot is None:
            if len(self._slots) >= SERIES:
                return self._other
            slot = self._numbers.find(self.family, clean)
            if slot is None:
                return self._other
            self._slots[clean] = slot
        return slot

    def place(self, labels: Labels) -> int:
        """Where among the numbers its series begins, for whoever adds to the same one again and again."""
        slot = self._slots.get(labels)
        return self._find(labels) if slot is None else slot

    def add(self, labels: Labels, amount: float = 1.0) -> None:
        """Count, of a counter (up only) or a gauge."""
        slot = self._slots.get(labels)
        if slot is None:
            slot = self._find(labels)
        self._values[slot] += amount

    def observe(self, labels: Labels, value: float) -> None:
        """One value of a histogram."""
        slot = self._slots.get(labels)
        if slot is None:
            slot = self._find(labels)
        self.observe_at(slot, value)

    def observe_at(self, place: int, value: float) -> None:
        """The same, of the series at that place."""
        values = self._values
        values[place + bisect_left(self._bounds, value)] += 1.0
        values[place + self._sum] += value

    def put(self, labels: Labels, value: float) -> None:
        """What a gauge stands at; of a counter, what this process has counted by itself elsewhere. One thread's."""
        slot = self._slots.get(labels)
        if slot is None:
            slot = self._find(labels)
        if self.family.kind == "counter":
            value += self._numbers.before(self.family, labels)
        self._values[slot] = value


def exposition(families: Sequence[Family], sums: Mapping[str, Mapping[Labels, Sequence[float]]]) -> str:
    """Prometheus's text format, version 0.0.4."""
    lines: list[str] = []
    for family in families:
        name = family.exposed
        samples: list[str] = []
        for labels, values in sums.get(family.name, {}).items():
            if family.labels and all(label == OTHER for label in labels) and not any(values):
                continue
            shown = [
                f'{key.replace(".", "_")}="{_escaped(value)}"'
                for key, value in zip(family.labels, labels, strict=False)
                if value
            ]
            if family.kind == "histogram":
                samples += _histogram(name, shown, family.bounds, values)
            else:
                samples.append(f"{name}{_braced(shown)} {_decimal(values[0])}")
        if samples:
            lines += [f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}", *samples]
    return "\n".join(lines) + "\n"


def _histogram(name: str, shown: list[str], bounds: Sequence[float], values: Sequence[float]) -> Iterator[str]:
    count = 0.0
    # The last of the values is the sum, which no bound stands beside.
    for bound, inside in zip([*map(_decimal, bounds), "+Inf"], values, strict=False):
        count += inside
        within = _braced([*shown, f'le="{bound}"'])
        yield f"{name}_bucket{within} {_decimal(count)}"
    yield f"{name}_sum{_braced(shown)} {_decimal(values[-1])}"
    yield f"{name}_count{_braced(shown)} {_decimal(count)}"


def _braced(labels: Sequence[str]) -> str:
    return "{" + ",".join(labels) + "}" if labels else ""


def _decimal(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
