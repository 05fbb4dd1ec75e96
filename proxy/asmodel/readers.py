"""How replies are often read: functions for `@step(returns=…)`, of the text to what it says."""

from __future__ import annotations

import re


def thoughts_and_answer(text: str) -> tuple[str, str]:
    """The whole text, and the answer in which it ends: what follows the last “the answer is”, or else the last line.

    Raises ValueError, whose words are for the model that is asked again, where the text is empty.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("The reply is empty; it should end with “So the answer is …”.")
    found = re.search(r"(?s:.*)\banswer\b[^.?!\n]{0,60}?\bis[:\s]*(\S[^\n]*)", text, re.IGNORECASE)
    return text.strip(), (found[1] if found else lines[-1]).strip().rstrip(".")
