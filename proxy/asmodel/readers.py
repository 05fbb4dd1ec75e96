"""How replies are often read: functions for `@step(returns=…)`, of the text to what it says."""

from __future__ import annotations

import json
import re

from asmodel.calls import canonical


def thoughts_and_answer(text: str) -> tuple[str, str]:
    """The whole text, and the answer in which it ends: what follows the last “the answer is”, or else the last line.

    Raises ValueError, whose words are for the model that is asked again, where the text is empty.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("The reply is empty; it should end with “So the answer is …”.")
    found = re.search(r"(?s:.*)\banswer\b[^.?!\n]{0,60}?\bis[:\s]*(\S[^\n]*)", text, re.IGNORECASE)
    return text.strip(), (found[1] if found else lines[-1]).strip().rstrip(".")


def canonical_json(text: str) -> str:
    """JSON in one form, to compare by: of equal values the texts are equal. Keys in order, no white space, 1.0 as 1.

    What is no JSON stays as it is, and so does what a server could not send on: half a surrogate pair, 1e999.
    """
    try:
        return canonical(json.loads(text)).decode()
    except (ValueError, RecursionError):
        return text
