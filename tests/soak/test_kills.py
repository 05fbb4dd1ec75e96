"""Two hundred times `kill -9` under load, or as often as the variable SOAK_KILLS says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.killing import bear_kills

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("SOAK_KILLS", "200"))


@pytest.mark.timeout(1800)
async def test_two_hundred_kills_under_load_lose_nothing_and_repeat_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = await bear_kills(tmp_path, kills=KILLS, seed=2)
    with capsys.disabled():
        print(told)
