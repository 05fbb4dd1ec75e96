"""The child process that runs the embedded model: llama.cpp's own server, on a port of the loopback interface.

Started as `python -m asmodel_plugins.embedded_child`. One line of JSON on standard input says what to run (a `Job`),
and holds the key: arguments are visible to every user of the machine. One line on standard output answers,
`{"port": …, "model": …, "threads": …}` once it can serve, or `{"error": …}`. It ends when its standard input closes.

A process of its own because a fault in native code must not take the server down, and because loading holds
Python's interpreter lock (measured: for the whole load), which would stop the server's event loop.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

HOST = "127.0.0.1"
ROOM = 2
"""The store of keys and values holds so many whole contexts, for all slots together: 23 kB a token with this model."""
BATCH = 256
"""Tokens of a prompt taken at a time. A caller who has left is noticed between two; the library's 2048 are seconds."""
HTTP_THREADS = 64
"""A request that waits or streams holds one of the server's HTTP threads; as many as slots would shut out the rest."""
PROMPT_CACHE_MIB = 256
"""Prompts kept outside the slots. Besides saving work it lets idle slots give their place up to calls that run."""
PING_SECONDS = 1
"""A stream with nothing to say is written to this often, which is how a caller who has left is noticed."""


@dataclass(frozen=True, slots=True)
class Job:
    """What the child is to run."""

    path: str
    model: str
    """What the server calls the model."""
    identity: str
    """Handed through to whoever asks the server which weights these are."""
    key: str
    port: int
    """0 takes a free one."""
    context: int
    """Tokens that one call may use."""
    slots: int
    """Calls at the same time."""
    threads: int | None
    """None: one less than there are cores. The last one is left to the server: llama.cpp's threads wait by spinning,
    and with something else on one of the cores two threads generated at a third of the speed of one (measured)."""

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def cores() -> int:
    """Cores that this process may use, by its affinity and by the quota of its control group (version 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def threads_for(count: int) -> int:
    """Threads on a machine of `count` cores; a model this small has no use for more than 8."""
    return max(1, min(8, count - 1))


def main() -> None:
    """Serve until standard input closes."""
    # Ctrl-C and a service manager's stop reach the whole group; the server still drains, and needs us meanwhile.
    for name in ("SIGINT", "SIGTERM"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    _end_with_parent()
    # The native library prints where it likes; what is left for the answer is a copy that it does not know.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        threads = job.threads or threads_for(cores())
        try:
            server = _serve(job, threads)
        except Exception as error:
            _say(answer, {"error": f"{type(error).__name__}: {error}" if str(error) else type(error).__name__})
            os._exit(1)
        address = str(server.listening_address)
        _say(answer, {"port": int(address.rpartition(":")[2]), "model": job.model, "threads": threads})
    threading.Event().wait()


def _serve(job: Job, threads: int) -> Any:
    xllamacpp: Any = import_module("xllamacpp")  # 100 MB of native code without types: loaded here and nowhere else
    params = xllamacpp.CommonParams()
    params.model.path = job.path
    params.model_alias = {job.model}
    params.model_tags = {job.identity}
    params.hostnames = [HOST]
    params.port = job.port
    params.api_keys = [job.key]
    params.n_parallel = job.slots
    params.kv_unified = True
    params.n_ctx = job.context * ROOM
    params.kv_unified_per_slot = job.context
    # Left to itself it would shrink the context to the memory that it finds.
    params.fit_params = False
    params.n_batch = params.n_ubatch = BATCH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # Embeddings beside answers, which are the same and come as fast (measured). Of the poolings only the last token's
    # takes texts longer than a batch; it finds a paraphrase among others as well as the mean does.
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    params.n_threads_http = HTTP_THREADS
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.sse_ping_interval = PING_SECONDS
    params.offline = True
    params.ui = False
    params.cors_origins = ""
    params.verbosity = 1  # errors; more would log prompts
    return xllamacpp.Server(params)


def _say(answer: TextIO, body: dict[str, object]) -> None:
    answer.write(json.dumps(body) + "\n")
    answer.flush()


def _end_with_parent() -> None:
    """End when standard input does: by a thread; and by signals, as no thread runs while native code holds the lock."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if hasattr(os, "O_ASYNC"):  # not on Windows
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)  # which is to end
        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
        if select.select([0], [], [], 0)[0]:
            os._exit(0)  # it closed before we watched

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


if __name__ == "__main__":
    main()
