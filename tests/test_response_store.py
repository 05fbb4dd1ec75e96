"""The store of responses, by itself: real files, and real processes that write to one of them at once."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from asmodel.errors import PayloadTooLarge
from asmodel.response_store import FILE, Kept, ResponseStore, StoreUnavailable

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(
    folder: Path, *, days: float = 7, most_bytes: int = 1_000_000, clock: Clock | None = None
) -> AsyncGenerator[ResponseStore]:
    store = ResponseStore(folder, days=days, most_bytes=most_bytes, clock=clock or Clock())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def files(folder: Path, pattern: str) -> list[Path]:
    return list(folder.glob(pattern))


async def chain(store: ResponseStore, id: str, scope: str = "ann") -> list[str]:
    return [kept.id for kept in await store.chain(scope, id, most=100, most_bytes=1_000_000)]


async def test_what_is_kept_is_found_by_whoever_kept_it(tmp_path: Path) -> None:
    async with opened(tmp_path / "kept") as store:
        assert await store.put("ann", "resp_1", b'{"a":1}')
        assert await store.put("ann", "resp_2", b'{"a":2}', previous="resp_1")
        assert await store.get("ann", "resp_2") == Kept("resp_2", "resp_1", b'{"a":2}')
        assert await chain(store, "resp_2") == ["resp_1", "resp_2"]
        assert await store.get("bob", "resp_2") is None
        assert await chain(store, "resp_2", "bob") == []
        assert not await store.delete("bob", "resp_2")
    async with opened(tmp_path / "kept") as store:
        assert await chain(store, "resp_2") == ["resp_1", "resp_2"]


async def test_what_is_deleted_is_gone_and_is_missed_by_those_that_go_on_from_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put("ann", "resp_1", b"a secret of ann's")
        await store.put("ann", "resp_2", b"2", previous="resp_1")
        assert await store.delete("ann", "resp_1")
        assert not await store.delete("ann", "resp_1")
        (left,) = await store.chain("ann", "resp_2", most=100, most_bytes=1_000)
        assert (left.id, left.previous) == ("resp_2", "resp_1")
    assert b"a secret of ann's" not in (tmp_path / FILE).read_bytes(), "what is deleted is overwritten"


async def test_what_was_not_gone_on_from_for_a_week_is_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, clock=clock) as store:
        await store.put("ann", "resp_1", b"1")
        await store.put("ann", "resp_old", b"old")
        clock.now += 6 * DAY
        assert await chain(store, "resp_1") == ["resp_1"], "this makes it young again"
        await store.put("ann", "resp_2", b"2", previous="resp_1")
        clock.now += 2 * DAY
        assert await store.get("ann", "resp_old") is None
        assert not await store.delete("ann", "resp_old")
        assert await chain(store, "resp_2") == ["resp_1", "resp_2"]
        clock.now += 8 * DAY
        assert await chain(store, "resp_2") == []
        await store.put("ann", "resp_3", b"3")
    with sqlite3.connect(tmp_path / FILE) as connection:
        assert connection.execute("SELECT id FROM responses").fetchall() == [("resp_3",)], "and its room is free"
        assert connection.execute("SELECT bytes FROM total").fetchone() == (1,)
    connection.close()


async def test_the_oldest_makes_room_for_the_newest(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, most_bytes=3_000, clock=clock) as store:
        for number in range(5):
            clock.now += 100
            assert await store.put("ann", f"resp_{number}", b"x" * 1_000)
        there = [number for number in range(5) if await store.get("ann", f"resp_{number}") is not None]
        assert there == [2, 3, 4]
        clock.now += 100
        assert await chain(store, "resp_2") == ["resp_2"]
        clock.now += 100
        await store.put("bob", "resp_5", b"x" * 1_000)
        assert await store.get("ann", "resp_3") is None
        assert await store.get("ann", "resp_2") is not None
        assert not await store.put("ann", "resp_6", b"x" * 3_001), "what is larger than all of it is not kept"
        assert await store.get("ann", "resp_2") is not None


async def test_a_chain_is_no_longer_than_a_request_may_be(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        previous = None
        for number in range(6):
            await store.put("ann", f"resp_{number}", b"x" * 100, previous=previous)
            previous = f"resp_{number}"
        assert len(await store.chain("ann", "resp_5", most=6, most_bytes=600)) == 6
        with pytest.raises(PayloadTooLarge):
            await store.chain("ann", "resp_5", most=5, most_bytes=600)
        with pytest.raises(PayloadTooLarge):
            await store.chain("ann", "resp_5", most=6, most_bytes=599)


async def test_the_folder_and_all_files_are_for_their_user_alone(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir(mode=0o755)
    (loose / FILE).touch(mode=0o644)
    for folder in (tmp_path / "state" / "asmodel" / "responses", loose):
        async with opened(folder) as store:
            await store.put("ann", "resp_1", b"1")
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
            assert {file.name for file in folder.iterdir()} >= {FILE, f"{FILE}-wal"}


@pytest.mark.parametrize("content", [b"this is no database" * 100, "another version"])
async def test_a_file_that_cannot_be_read_is_set_aside(
    content: bytes | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    else:
        connection = sqlite3.connect(tmp_path / FILE)
        connection.execute("CREATE TABLE responses (a)")
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    async with opened(tmp_path) as store:
        assert await store.put("ann", "resp_1", b"1")
        assert await chain(store, "resp_1") == ["resp_1"]
    assert len(files(tmp_path, f"{FILE}.broken-*")) == 1
    assert "a new one is begun" in caplog.text


async def test_a_store_that_is_deleted_under_it_is_begun_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put("ann", "resp_1", b"1")
        for file in files(tmp_path, f"{FILE}*"):
            file.unlink()
        assert await store.get("ann", "resp_1") is None
        assert await store.put("ann", "resp_2", b"2")
    async with opened(tmp_path) as store:
        assert await store.get("ann", "resp_2") is not None


async def test_a_store_that_cannot_be_opened_says_so_and_keeps_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    async with opened(tmp_path / "file" / "responses") as store:
        assert "responses are not kept" in caplog.text
        assert not await store.put("ann", "resp_1", b"1")
        with pytest.raises(StoreUnavailable):
            await store.get("ann", "resp_1")


async def test_a_folder_that_others_share_is_not_made_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    async with opened(shared) as store:
        assert not await store.put("ann", "resp_1", b"1")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o1777 & 0o777 | stat.S_ISVTX
    assert "[store] path" in caplog.text


async def test_the_event_loop_goes_on_while_the_file_is_locked(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.put("ann", "resp_1", b"1")
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        waiting = asyncio.ensure_future(store.put("ann", "resp_2", b"2"))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not waiting.done()
        other.execute("COMMIT")
        other.close()
        assert await waiting


WRITER = """
import asyncio, sys
from pathlib import Path
from asmodel.response_store import ResponseStore

async def main():
    store = ResponseStore(Path(sys.argv[1]), days=7, most_bytes=10_000_000)
    await store.open()
    for number in range(int(sys.argv[3])):
        previous = f"resp_{number - 1}" if number else None
        assert await store.put(sys.argv[2], f"resp_{number}", b"x" * 100, previous=previous)
        print(number, flush=True)
    await store.close()

asyncio.run(main())
"""


def writer(folder: Path, scope: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), scope, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})


async def test_several_processes_keep_theirs_in_one_file(tmp_path: Path) -> None:
    writers = [writer(tmp_path, scope, 60) for scope in ("ann", "bob", "cid")]
    for process in writers:
        process.communicate(timeout=20)
        assert process.returncode == 0
    async with opened(tmp_path, clock=None, days=100_000) as store:
        for scope in ("ann", "bob", "cid"):
            assert await chain(store, "resp_59", scope) == [f"resp_{number}" for number in range(60)]


async def test_what_was_said_to_be_kept_survives_a_kill(tmp_path: Path) -> None:
    process = writer(tmp_path, "ann", 1_000_000)
    assert process.stdout is not None
    said = ""
    for _ in range(50):
        said = process.stdout.readline()
    process.kill()
    said = (process.stdout.read().splitlines() or [said])[-1]
    process.wait()
    process.stdout.close()
    async with opened(tmp_path, days=100_000) as store:
        last = int(said)
        found = await store.chain("ann", f"resp_{last}", most=1_000_000, most_bytes=100_000_000)
        assert len(found) == last + 1
        assert await store.put("ann", "resp_next", b"x", previous=f"resp_{last}")
