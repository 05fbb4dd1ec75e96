"""A real nginx before several servers, as a Service and an Ingress are: whom it asks can be changed while it runs."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tests.e2e.images import program
from tests.redis_serving import free_port
from tests.serving import PATIENCE, eventually, listens

CONFIG = """
daemon off;
master_process on;
worker_processes {workers};
pid {folder}/nginx.pid;
error_log {folder}/error.log notice;
events {{ worker_connections 2048; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream servers {{ {servers} }}
    server {{
        listen 127.0.0.1:{port};
        client_max_body_size 20m;
        location / {{
            proxy_pass http://servers;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 3600s;
            # A request that may have been begun is not sent to another: it is the servers that must lose none.
            proxy_next_upstream off;
        }}
    }}
}}
"""
WORKERS = 2
BEGUN = "start worker process "
"""What it logs for each."""


class Nginx:
    """One that asks `ports` in turn. Nothing is tried twice."""

    def __init__(self, folder: Path, ports: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._write(ports)

    def _write(self, ports: Sequence[int]) -> None:
        servers = " ".join(f"server 127.0.0.1:{port} max_fails=0;" for port in ports)
        text = CONFIG.format(folder=self._folder, servers=servers, port=self.port, workers=WORKERS)
        (self._folder / "nginx.conf").write_text(text)

    def ask(self, ports: Sequence[int]) -> None:
        """From now on these are asked; what others have begun to answer goes on."""
        assert self._process is not None
        self._write(ports)
        before = self._said.count(BEGUN)
        os.kill(self._process.pid, signal.SIGHUP)
        eventually("nginx's new workers have begun", lambda: self._said.count(BEGUN) >= before + WORKERS, 60)

    @property
    def _said(self) -> str:
        file = self._folder / "error.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def __enter__(self) -> Nginx:
        nginx = program("nginx", "/usr/sbin/nginx", ["nginx"])
        command = [str(nginx), "-c", str(self._folder / "nginx.conf"), "-p", str(self._folder)]
        with (self._folder / "output.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-e", str(self._folder / "error.log")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        eventually("nginx listens", lambda: self._runs() and listens(self.port))
        return self

    def _runs(self) -> bool:
        assert self._process is not None
        words = (self._folder / "output.log").read_text(errors="replace") + self._said
        assert self._process.poll() is None, f"nginx ended with {self._process.returncode}: {words[-2_000:]}"
        return True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE)
