"""Whether an upstream really scores given text: proven by trying, because servers take the parameters and ignore them.

Seen: `echo` taken and ignored (llama.cpp's server), echo that scores each token with the distribution one place too
late (llama-cpp-python), null in place of the prompt's log-probabilities. So nothing is believed that is not proven: by
count (one log-probability for each token of the text), and by a probe (a continuation that was generated with its
log-probabilities has the same ones when it is scored as a given text). Pure: the caller brings the requests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, cast

from asmodel.calls import TokenLogprob
from asmodel.dialect import finite, first_choice, logprobs_of, mapping

Generate = Callable[[str], Awaitable[Sequence[TokenLogprob]]]
"""Continue a prompt greedily by about PROBE_TOKENS tokens, with the log-probability of each; none at once is fine."""

Measure = Callable[[str, str], Awaitable[Sequence[TokenLogprob]]]
"""The log-probabilities of (context, continuation)'s continuation. Raises ValueError where the answer has none."""

PROBE_TOKENS = 8
PROBES = (
    "The capital of France is",
    "Once upon a time there was a little girl who lived in",
    "One, two, three, four,",
)
NONSENSE = " gravel seventeen umbrella nevertheless"
"""Less likely after any probe than what the model itself continues it with."""

TOLERANCE = 0.05
"""Nats a token: other kernels and batch shapes move a log-probability by a few hundredths (measured on llama.cpp)."""
TOLERANCE_WHOLE = 0.1


class Trial:
    """Whether an upstream can be proven to score, tried once. `forbidden`: it cannot, and is not tried.

    Tasks that ask at the same moment share one trial. One that failed for want of an answer is not remembered.
    """

    def __init__(self, attempt: Callable[[], Coroutine[Any, Any, bool]], *, forbidden: bool = False) -> None:
        self._attempt = attempt
        self._found: bool | None = False if forbidden else None
        self._trying: asyncio.Task[bool] | None = None

    @property
    def proven(self) -> bool:
        """Whether it is by now."""
        return self._found is True

    async def made(self) -> bool:
        """Whether it is, after a trial where there was none. Raises what the trial raised."""
        if self._found is not None:
            return self._found
        if self._trying is None:
            self._trying = asyncio.get_running_loop().create_task(self._attempt())
        trial = self._trying
        try:
            # A caller that leaves must not end the trial of the others; close() does.
            self._found = found = await asyncio.shield(trial)
            return found
        finally:
            if trial.done() and self._trying is trial:
                self._trying = None

    async def close(self) -> None:
        """End a trial that is under way."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
            self._trying = None


async def proven(generate: Generate, ways: Mapping[str, Measure]) -> str | None:
    """The first of the ways, in order, whose measurements agree with what was generated; None where none does.

    A way that raises ValueError is no way. Anything else that is raised (no connection, a limit) proves nothing
    either way and goes to the caller.
    """
    samples: list[tuple[str, Sequence[TokenLogprob]]] = []
    for prompt in PROBES:
        try:
            generated = await generate(prompt)
        except ValueError:
            return None
        if generated and "".join(token.token for token in generated).strip():
            samples.append((prompt, generated))
        if len(samples) == 2:
            break
    if not samples:
        return None
    for name, measure in ways.items():
        try:
            if await _agrees(measure, samples):
                return name
        except ValueError:
            continue
    return None


async def _agrees(measure: Measure, samples: Sequence[tuple[str, Sequence[TokenLogprob]]]) -> bool:
    proofs = 0
    for prompt, generated in samples:
        text = "".join(token.token for token in generated)
        measured = await measure(prompt, text)
        if len(measured) != len(generated):
            # A text may be read back in other tokens than it was written in; that proves nothing either way.
            if not measured:
                return False
            continue
        if not _close(measured, generated):
            return False
        proofs += 1
    if not proofs:
        return False
    # A server that returns what it would have said itself agrees with every probe; it has to see other text too.
    prompt, generated = samples[0]
    nonsense = await measure(prompt, NONSENSE)
    return bool(nonsense) and _mean(nonsense) < _mean(generated) - TOLERANCE


def _close(measured: Sequence[TokenLogprob], generated: Sequence[TokenLogprob]) -> bool:
    difference = math.fsum(t.logprob for t in measured) - math.fsum(t.logprob for t in generated)
    return abs(difference) <= TOLERANCE * len(generated) + TOLERANCE_WHOLE


def _mean(tokens: Sequence[TokenLogprob]) -> float:
    return math.fsum(t.logprob for t in tokens) / len(tokens)


def generated_of(body: Mapping[str, Any]) -> list[TokenLogprob]:
    """The generated tokens of a completion that was asked for with `logprobs`. Raises ValueError where it has none."""
    choice = first_choice(body)
    tokens = logprobs_of(choice.get("logprobs"))
    text = choice.get("text")
    if not isinstance(text, str) or not tokens:
        raise ValueError("no log-probabilities of generated text")
    # A token for the end of the text has a probability and no place in the text.
    while tokens and "".join(t.token for t in tokens) != text:
        tokens.pop()
    return tokens


def prompt_tokens(body: Mapping[str, Any]) -> int | None:
    """How many tokens the server says that the prompt has."""
    count = mapping(body.get("usage")).get("prompt_tokens")
    return count if isinstance(count, int) else None


def echoed(body: Mapping[str, Any], context: str, continuation: str, *, more: int = 0) -> tuple[TokenLogprob, ...]:
    """The tokens of the continuation in the answer to a completion of both with `echo`, `logprobs` and `max_tokens`.

    `more` is that `max_tokens`: so many tokens at the end were generated, and are dropped. Raises ValueError where the
    log-probabilities are not one for each token of the prompt.
    """
    shape = mapping(first_choice(body).get("logprobs"))
    tokens, values = shape.get("tokens"), shape.get("token_logprobs")
    if not isinstance(tokens, list) or not isinstance(values, list):
        raise ValueError("no `token_logprobs` came back")
    texts = [str(token) for token in cast("list[object]", tokens)]
    numbers = [finite(value) for value in cast("list[object]", values)]
    count = prompt_tokens(body)
    if count is not None and not count <= len(texts) <= count + more:
        raise ValueError(f"{len(texts)} log-probabilities for a prompt of {count} tokens")
    end = len(texts) - more if count is None else count
    return continuation_of(context, continuation, texts[:end], numbers[:end])


def continuation_of(
    context: str, continuation: str, tokens: Sequence[str], logprobs: Sequence[float | None]
) -> tuple[TokenLogprob, ...]:
    """Of an echo of context + continuation (and perhaps more after it), the tokens of the continuation.

    Those are the tokens that end after the context. One that lies across the boundary counts: its probability is the
    only one that covers the first characters of the continuation. Places come from the tokens' own texts, not from
    the server's offsets, which some count with the token for the beginning of the text and some without.

    Raises ValueError where the tokens are not those of the text, or where one of them has no log-probability.
    """
    text = context + continuation
    if len(tokens) != len(logprobs):
        raise ValueError(f"{len(logprobs)} log-probabilities for {len(tokens)} tokens")
    # A token such as <s> may stand in front of the text.
    lead = 1 if tokens and logprobs[0] is None and "".join(tokens[1:]) == text else 0
    places = _places(text, tokens, lead)
    if places is None and tokens and not lead:
        lead = 1
        places = _places(text, tokens, lead)
    if places is None:
        raise ValueError("the echoed tokens are not those of the text")
    chosen: list[TokenLogprob] = []
    for token, logprob, (start, end) in zip(tokens[lead:], logprobs[lead:], places, strict=True):
        if end <= len(context) or start >= len(text):
            continue
        if _broken(token) and start < len(context):
            raise ValueError("a character at the boundary is spread over many tokens")
        if logprob is None or not math.isfinite(logprob):
            raise ValueError("a token of the continuation has no log-probability; the context must not be empty")
        chosen.append(TokenLogprob(token, float(logprob)))
    if continuation and not chosen:
        raise ValueError("no token of the continuation came back")
    return tuple(chosen)


def _broken(token: str) -> bool:
    """Whether the token is a part of a character, which servers write as U+FFFD, as nothing, or as `bytes:...`."""
    return not token or "\ufffd" in token or token.startswith("bytes:")


def _places(text: str, tokens: Sequence[str], lead: int) -> list[tuple[int, int]] | None:
    """Start and end in the text of each token after the first `lead`; None where they are not the text's.

    A run of parts of characters is given the whole of the text up to the next token that can be read.
    """
    rest = tokens[lead:]
    places: list[tuple[int, int]] = []
    at = 0
    while len(places) < len(rest):
        token = rest[len(places)]
        if at >= len(text):
            places.append((at, at + len(token)))
            at += len(token)
        elif not _broken(token):
            if not text.startswith(token, at):
                return None
            places.append((at, at + len(token)))
            at += len(token)
        else:
            run = 1
            while len(places) + run < len(rest) and _broken(rest[len(places) + run]):
                run += 1
            following = rest[len(places) + run] if len(places) + run < len(rest) else ""
            # A token holds at least a byte, so a run of them holds at most as many characters, and U+FFFD may stand
            # beside readable ones.
            most = sum(max(1, len(part)) for part in rest[len(places) : len(places) + run])
            widths = [w for w in range(1, min(most, len(text) - at) + 1) if _continues(text, at + w, following)]
            if not widths:
                return None
            places += [(at, at + widths[0])] * run
            at += widths[0]
    return places if at >= len(text) else None


def _continues(text: str, at: int, following: str) -> bool:
    return text.startswith(following, at) if following else at == len(text)
