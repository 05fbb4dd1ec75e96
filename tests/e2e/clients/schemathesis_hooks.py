"""What schemathesis is told about a server of asmodel: models that it has, and which failures are faults of its own."""

from __future__ import annotations

from typing import Any

import schemathesis

MODELS = ("plain", "self-consistency", "default")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Of requests that are right, most ask for a model that is served, or nearly all would end with its name."""
    body = case.body
    right = case.meta is not None and case.meta.generation.mode.value == "positive"
    if not right or not isinstance(body, dict) or not isinstance(body.get("model"), str) or len(body["model"]) % 4 == 3:
        return
    name = MODELS[len(body["model"]) % 3] if "chat" in case.path else "default"
    case.body = {**body, "model": name}


@schemathesis.check
def no_fault_of_the_servers_own(context: Any, response: Any, case: Any) -> None:
    """What the scripted upstream or the request brings about has a code; only a bug has none."""
    if response.status_code < 500:
        return
    error = response.json()["error"]
    codes = {"not_cached", "deadline_exceeded", "upstream_rejected", "step_unreadable", "upstream_broken"}
    assert error["code"] in codes, f"{response.status_code} {error}"
