"""The lock files say exactly what is installed, and `docs/dependencies.md` speaks of just those versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, DEVELOPMENT = ROOT / "requirements.lock", ROOT / "requirements-dev.lock"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def direct() -> list[Requirement]:
    return [Requirement(text) for text in project()["project"]["dependencies"]]


def pins(lock: Path) -> dict[str, str]:
    """Version by package. Each must be pinned exactly and have at least one hash."""
    blocks = re.split(r"\n(?=[a-z0-9])", lock.read_text(encoding="utf-8"))[1:]
    found: dict[str, str] = {}
    for block in blocks:
        pin = re.match(r"([a-z0-9-]+)==(\S+)", block)
        assert pin, f"{lock.name}: {block.splitlines()[0]!r} is not pinned"
        assert "--hash=sha256:" in block, f"{lock.name}: {pin[1]} has no hash"
        found[pin[1]] = pin[2]
    return found


def test_every_dependency_is_locked_within_its_bounds() -> None:
    locked = pins(RUNTIME)
    for requirement in direct():
        assert requirement.specifier.contains(locked[requirement.name]), f"make lock: {requirement} is not {locked}"


def test_the_development_lock_is_the_runtime_lock_and_more() -> None:
    runtime, development = pins(RUNTIME), pins(DEVELOPMENT)
    assert runtime.items() < development.items()


def test_the_lock_files_name_no_address() -> None:
    for lock in (RUNTIME, DEVELOPMENT):
        text = lock.read_text(encoding="utf-8")
        assert not re.search(r"://|^\s*-(i|f|-index-url|-extra-index-url|-find-links|-trusted-host)\b", text, re.M)


def test_known_bad_releases_of_litellm_are_refused() -> None:
    (litellm,) = (requirement for requirement in direct() if requirement.name == "litellm")
    assert {"1.82.7", "1.82.8"} <= {specifier.version for specifier in litellm.specifier if specifier.operator == "!="}
    assert not litellm.specifier.contains("1.82.7")
    assert not litellm.specifier.contains("1.82.8")


def test_each_dependency_has_its_line_with_the_version_that_is_locked() -> None:
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    locked = pins(RUNTIME)
    # `opentelemetry-api, -sdk` is one line for two packages of one version.
    rows = {
        name.strip(): cells
        for name, *cells in (line.strip("| ").split("|") for line in page.splitlines() if "|" in line)
    }
    for requirement in direct():
        name = (
            "opentelemetry-api, -sdk"
            if requirement.name in {"opentelemetry-api", "opentelemetry-sdk"}
            else requirement.name
        )
        assert name in rows, f"docs/dependencies.md has no line for {requirement.name}"
    for name, cells in rows.items():
        package = name.split(",")[0]
        if package in locked and re.fullmatch(r"[\d.]+", cells[0].strip()):
            assert cells[0].strip() == locked[package], (
                f"docs/dependencies.md: {package} is locked at {locked[package]}"
            )
