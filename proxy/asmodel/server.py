"""`asmodel serve`: one socket, bound only when all else is known to be right, and the processes that answer on it."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from asmodel import request_log
from asmodel.access import is_loopback
from asmodel.errors import ConfigurationError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from asmodel.app import Parts
    from asmodel.settings import Settings

FLAGS = "ASMODEL_FLAGS"
"""How a worker learns the flags that its parent was started with: JSON; it reads file and environment itself."""

log = logging.getLogger("asmodel")


def serve(
    settings: Settings,
    *,
    config: Path | None,
    reload: bool,
) -> None:
    """Serve until told to stop. Raises ConfigurationError for whatever keeps it from answering at all."""
    from asmodel.app import build, create_app
    from asmodel.preparing import prepared

    _take_files()
    _check_address(settings)
    parts = build(settings)
    sock = _bound(settings)
    alone = settings.workers == 1 and not reload
    with sock, prepared(parts, shared=not alone):
        _listen(sock, settings)
        failures: list[BaseException] = []
        if alone:
            _set_up_log(settings.log.format)

            def failed(error: BaseException) -> None:
                failures.append(error)
                server.should_exit = True

            def opened() -> None:
                _announce(settings, parts, sock)

            app = create_app(settings, parts=parts, on_open=opened, on_ready=_settle, on_failure=failed)
            server = _server(_config(app, settings), parts)
            server.run(sockets=[sock])
        else:
            _announce(settings, parts, sock)
            os.environ[FLAGS] = json.dumps(_flags(settings))
            if config is not None:
                os.environ["ASMODEL_CONFIG"] = str(config)
            _supervise(settings, config, sock, reload=reload)
    if failures:
        raise ConfigurationError(f"cannot serve: {failures[0]}") from failures[0]


def worker() -> ASGIApp:
    """The application of one of several processes, from file, environment and its parent's flags."""
    return _worker(_end_worker)


def reloaded_worker() -> ASGIApp:
    """The same where a change of the files starts it anew: what cannot be opened waits for that change."""
    return _worker(None)


def _worker(on_failure: Callable[[BaseException], None] | None) -> ASGIApp:
    from asmodel.app import create_app
    from asmodel.settings import load

    _set_up_log("console")
    try:
        settings = load(flags=json.loads(os.environ.get(FLAGS, "{}")))
        _set_up_log(settings.log.format)
        return create_app(settings, on_ready=_settle, on_failure=on_failure)
    except ConfigurationError as error:
        # The parent found all to be right, so a file has changed since.
        log.error("%s", error)
        sys.exit(STARTUP_FAILURE)


STARTUP_FAILURE = 3
"""Exit code of a worker that cannot start, by which uvicorn's supervisor knows that another would fare no better."""


def _end_worker(error: BaseException) -> None:
    log.error("cannot serve: %s", error)
    # Nothing has been answered yet, so nothing is left to be ended in good order.
    os._exit(STARTUP_FAILURE)


def _settle() -> None:
    """Take what has been loaded out of the garbage collector's sight, and let it look less often.

    A full collection walks over every object there is, which halts all answers for some 40 ms; what was made before the
    first request stays for good. Most of a request's objects are freed as soon as they are not used, without it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 5)
    sys.setswitchinterval(0.0005)


def _check_address(settings: Settings) -> None:
    if is_loopback(settings.host):
        return
    if not settings.keys:
        raise ConfigurationError(
            f"{settings.host} can be reached from other machines, and anyone there could spend your upstreams' money: "
            'set keys ([keys] alice = "env:ALICE_KEY"), or bind 127.0.0.1'
        )
    if settings.embedded_by_default:
        raise ConfigurationError(
            f"{settings.host} can be reached from other machines, and no upstream is set: name one under [upstreams], "
            'or the embedded model by name ([upstreams.default] kind = "embedded")'
        )


def _take_files() -> None:
    """As many open files as this process may have: a stream is two connections, and the usual limit is 1,024 files."""
    try:
        import resource
    except ImportError:  # There is no such limit on Windows.
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _bound(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named, for asyncio leaves Nagle's algorithm on where it is not, and each answer then waits 40 ms.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
    except OSError as error:
        sock.close()
        raise _unlistenable(settings, error) from None
    sock.set_inheritable(True)
    return sock


def _listen(sock: socket.socket, settings: Settings) -> None:
    """From here on whoever connects is answered, or waits until the event loop runs, some milliseconds later."""
    try:
        sock.listen(2048)
    except OSError as error:
        # Linux lets two sockets bind an address as long as neither listens.
        raise _unlistenable(settings, error) from None


def _unlistenable(settings: Settings, error: OSError) -> ConfigurationError:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    what = f"cannot listen at {host}:{settings.port}: {(error.strerror or str(error)).lower()}"
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        what += f"; try another port: --port {settings.port + 1 if 1024 <= settings.port < 65535 else 8000}"
    return ConfigurationError(what)


def _config(app: ASGIApp | str, settings: Settings) -> uvicorn.Config:
    import uvicorn

    return uvicorn.Config(
        app,
        factory=isinstance(app, str),
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        ws="none",
        log_config=None,
        access_log=False,
        http="asmodel.connections:Connection",
        server_header=False,
        proxy_headers=False,  # nobody here asks where a request came from, and each would be looked through for it
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )


def _server(config: uvicorn.Config, parts: Parts) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # From the signal on, not only when the last stream has ended: `/readyz` says 503 and no run begins. Unlike
            # the class above, the signal is not raised again at the end: being told to stop is no failure.
            parts.service.draining = True
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    return Server(config)


def _flags(settings: Settings) -> dict[str, object]:
    return {
        "host": settings.host,
        "port": settings.port,
        "workers": settings.workers,
        "program_folders": [str(folder) for folder in settings.program_folders],
    }


def _supervise(settings: Settings, config: Path | None, sock: socket.socket, *, reload: bool) -> None:
    import uvicorn
    from uvicorn.supervisors import ChangeReload, Multiprocess

    from asmodel.metric_store import shared_folder

    _set_up_log(settings.log.format)
    made = _config("asmodel.server:worker", settings)
    if reload:
        folders = [str(folder.absolute()) for folder in settings.program_folders]
        file = (config or Path("asmodel.toml")).absolute()
        made = uvicorn.Config(
            "asmodel.server:reloaded_worker",
            factory=True,
            reload=True,
            ws="none",
            reload_dirs=[*folders, str(file.parent)],
            reload_includes=["*.py", "*.toml"],
            log_config=None,
            access_log=False,
            http="asmodel.connections:Connection",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        ChangeReload(made, target=uvicorn.Server(made).run, sockets=[sock]).run()
    else:
        supervisor = Multiprocess(made, sockets=[sock])
        with shared_folder() as variables:
            # The workers inherit it, those that take the place of others too.
            os.environ.update(variables)
            supervisor.run()
        if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
            sys.exit(1)


def _announce(settings: Settings, parts: Parts, sock: socket.socket) -> None:
    from asmodel import __version__

    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    models = parts.models
    upstreams = ", ".join(
        f"{name} ({s.kind}{': ' + str(s.options['model']) if 'model' in s.options else ''})"
        for name, s in settings.effective_upstreams.items()
    )
    if settings.embedded_by_default:
        upstreams = "default: the embedded SmolLM2-135M-Instruct, because no upstream is set"
    lines = [
        f"asmodel {__version__} on http://{shown}:{port}/v1",
        *textwrap.wrap(
            f"  programs   {', '.join(sorted((*models.programs, *models.presets)))}",
            width=80,
            subsequent_indent=" " * 13,
            break_on_hyphens=False,
            break_long_words=False,
        ),
        f"  upstreams  {upstreams}",
        f"  cache      {settings.cache.kind} {settings.cache.options.get('path', '')}".rstrip(),
    ]
    if parts.responses is not None:
        lines.append(f"  responses  {parts.responses.folder}")
    if settings.traces.local:
        lines.append("  traces     asmodel trace")
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _set_up_log(format: request_log.Format) -> None:
    handler = request_log.handler(format)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
