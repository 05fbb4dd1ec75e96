"""The stores that the tests run on: each server that this machine has, and Debian's Redis where it has none."""

from __future__ import annotations

from tests.e2e import images
from tests.redis_serving import installed_servers

SERVERS = [*dict.fromkeys([*installed_servers(), "redis"])]
"""By the names of test ids. What is not here is fetched when the first test wants it."""

WITH_TLS = [name for name in SERVERS if name != "packaged-valkey"]
"""The packaged one is built without."""


def program(name: str) -> str:
    """The server of that name. Raises EnvironmentUnavailable."""
    installed = installed_servers().get(name)
    return installed or str(images.program("redis", "/usr/bin/redis-server", ["redis-server", "redis-tools"]))
