"""The log-likelihood of given text as a real vLLM sends it: bodies of its version 0.32, as they came, but for ids."""

from __future__ import annotations

import re
from typing import Any

import pytest

from asmodel.calls import Score, Terms
from asmodel.likelihood import echoed, generated_of
from asmodel.testing import ScriptedServer
from asmodel_plugins.openai_upstream import OpenAIUpstream

PROMPT: list[Any] = [
    None,
    {"3575": {"logprob": -11.539274215698242, "rank": 2923, "decoded_token": " capital"}},
    {"282": {"logprob": -0.3376066982746124, "rank": 1, "decoded_token": " of"}},
    {"4649": {"logprob": -2.4386610984802246, "rank": 2, "decoded_token": " France"}},
    {"314": {"logprob": -0.45092111825942993, "rank": 1, "decoded_token": " is"}},
    {"7042": {"logprob": -0.25807321071624756, "rank": 1, "decoded_token": " Paris"}},
]
LOGPROBS: list[Any] = [None, *(next(iter(place.values()))["logprob"] for place in PROMPT[1:])]
TOKENS = ["The", " capital", " of", " France", " is", " Paris"]


def body(text: str, logprobs: Any, prompt_tokens: int, completion_tokens: int, given: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "prompt_logprobs": given,
        "prompt_token_ids": None,
        "routed_experts": None,
    }
    usage = {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    return {
        "id": "cmpl-0",
        "object": "text_completion",
        "created": 1795514132,
        "model": "smol",
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0-0",
        "usage": usage,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }


ECHO = {
    "text_offset": [0, 3, 11, 14, 21, 24],
    "token_logprobs": LOGPROBS,
    "tokens": TOKENS,
    "top_logprobs": [None, *({t: p} for t, p in zip(TOKENS[1:], LOGPROBS[1:], strict=True))],
}


def test_an_echo_with_no_token_more_is_read() -> None:
    whole = body("The capital of France is Paris", ECHO, 6, 0, PROMPT)
    tokens = echoed(whole, "The capital of France is", " Paris")
    assert [(t.token, t.logprob) for t in tokens] == [(" Paris", -0.25807321071624756)]
    tokens = echoed(whole, "The capital", " of France is Paris")
    assert sum(t.logprob for t in tokens) == pytest.approx(-3.48526218533516)


def test_the_generated_tokens_that_prove_it_are_read() -> None:
    shape = {"text_offset": [0, 4], "token_logprobs": [-0.5, -0.25], "tokens": [" the", " city"], "top_logprobs": None}
    assert [t.logprob for t in generated_of(body(" the city", shape, 3, 2, None))] == [-0.5, -0.25]


def pieces(text: str) -> list[str]:
    return re.findall(r"\s*\S+", text)


def answering(request: dict[str, Any]) -> dict[str, Any]:
    """A vLLM to which a word is the less likely the longer it is, whatever stands before it; it echoes nothing."""
    given = pieces(request["prompt"])
    if "prompt_logprobs" in request:
        entries: list[Any] = [None]
        entries += [{str(n): {"logprob": -len(w) / 10, "rank": 1, "decoded_token": w}} for n, w in enumerate(given[1:])]
        return body(" Paris", None, len(given), 1, entries)
    shape = {"text_offset": [0], "token_logprobs": [-0.6], "tokens": [" Paris"], "top_logprobs": [{" Paris": -0.6}]}
    return body(" Paris", shape if "logprobs" in request else None, len(given), 1, None)


async def test_prompt_logprobs_are_found_proven_and_used() -> None:
    with ScriptedServer(answering) as server:
        upstream = OpenAIUpstream(name="vllm", base_url=server.base_url, model="smol")
        await upstream.open()
        try:
            assert (await upstream.detect()).loglikelihood
            server.clear()
            asked = Score(identity="i", context="The capital of France", continuation=" is Paris")
            reply = await upstream.send(asked, Terms())
            (sent,) = server.requests
        finally:
            await upstream.close()
    assert [(t.token, t.logprob) for t in reply.logprobs] == [(" is", -0.3), (" Paris", -0.6)]
    assert (sent.path, sent.body["prompt_logprobs"]) == ("/v1/completions", 0)
