"""What is said between the load, the targets and the upstream of the benchmark: one question, one answer.

Sizes are those of an ordinary call with some context: a request of about 4 kB, a response of about 1.7 kB, a stream of
16 tokens.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

WORDS = re.findall(
    r"\w+",
    "the proxy hands a question on and an answer back while the clock runs and every byte that it touches has a price "
    "so we count them one by one and say what they cost",
)


def text(size: int, seed: int = 0) -> str:
    """English-looking text of exactly `size` characters; another `seed` starts it at another word."""
    out: list[str] = []
    length, at = 0, seed
    while length < size:
        word = WORDS[at % len(WORDS)]
        out.append(word)
        length += len(word) + 1
        at += 1 + (at % 3 == 0)
    return " ".join(out)[:size]


MODEL = "bench"
"""The model's name at the upstream."""
QUESTION = text(3_300)
SYSTEM = text(600, seed=7)
ANSWER = text(1_400, seed=3)
"""What a response without a stream says."""
TOKENS = tuple(f"{word} " for word in text(200, seed=11).split()[:16])
"""What a stream says, a chunk each."""
STREAMED = "".join(TOKENS)
USAGE = {"prompt_tokens": 900, "completion_tokens": 16, "total_tokens": 916}


def question(model: str, *, stream: bool = False, unique: str = "") -> dict[str, Any]:
    """The body of a request. `unique` stands at the end of what the user says."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION + unique},
        ],
    }
    if stream:
        body["stream"] = True
    return body


def completion() -> dict[str, Any]:
    """The body of a response to a chat completion."""
    return {
        "id": "chatcmpl-0123456789abcdefghijklmnop",
        "object": "chat.completion",
        "created": 1_750_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "system_fingerprint": "fp_0123456789",
    }


def legacy_completion() -> dict[str, Any]:
    """The body of a response to a completion of a text."""
    return {
        "id": "cmpl-0123456789abcdefghijklmnop",
        "object": "text_completion",
        "created": 1_750_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }


def events(*, chat: bool = True, usage: bool = False) -> list[bytes]:
    """The events of a stream: who speaks, the tokens, why it ends, the usage if it is wanted, and that it is done."""
    head: dict[str, Any] = {k: v for k, v in (completion() if chat else legacy_completion()).items()}
    del head["choices"], head["usage"]
    if chat:
        head["object"] = "chat.completion.chunk"

    def chunk(piece: str | None, finish: str | None, role: str | None = None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if not chat:
            return {**choice, "text": piece or ""}
        delta: dict[str, Any] = {} if piece is None else {"content": piece}
        return {**choice, "delta": {"role": role, **delta} if role else delta}

    choices = [*(chunk(token, None) for token in TOKENS), chunk(None, "stop")]
    if chat:
        choices.insert(0, chunk("", None, "assistant"))
    bodies: list[dict[str, Any]] = [{**head, "choices": [choice]} for choice in choices]
    if usage:
        bodies = [{**body, "usage": None} for body in bodies]
        bodies.append({**head, "choices": [], "usage": USAGE})
    return [b"data: " + orjson.dumps(body) + b"\n\n" for body in bodies] + [b"data: [DONE]\n\n"]
