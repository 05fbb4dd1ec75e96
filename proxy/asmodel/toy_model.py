"""What a scripted server says where it is told nothing: a model without weights, and OpenAI's bodies made of it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import orjson

from asmodel.calls import pieces

Scores: TypeAlias = Literal["echo", "grammar", "prompt_logprobs", "ignored", "shifted"]
"""How the server gives the log-likelihood of a given text: `echo` with `logprobs` on completions; `/tokenize` and a
grammar of token literals, as llama.cpp; `prompt_logprobs`, as vLLM; not at all, while taking every parameter
(`ignored`); or by echo with each token scored one place too late (`shifted`)."""


class ToyModel:
    """A language model with no weights: the same words after the same words, always, and their log-probabilities.

    A token is a word with the space before it, or one other character. The likeliest next token follows from the last
    three; a word that the text already holds is likelier than one that it does not, so that a question scores higher
    after the paragraph that answers it.
    """

    words = tuple(
        re.findall(
            r"\w+",
            "amber basil cedar delta ember fable grove harbor island jasmine kettle lantern meadow nectar orchard"
            " pebble quartz river saffron timber umber valley willow yarrow zephyr the of and in is to a",
        )
    )

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._lock = threading.Lock()

    @staticmethod
    def tokens(text: str) -> list[str]:
        """The text in tokens; joined, they are the text again."""
        return re.findall(r" ?\w+|\s|[^\w\s]", text)

    def id_of(self, token: str) -> int:
        with self._lock:
            if token not in self._ids:
                self._ids[token] = len(self._texts)
                self._texts.append(token)
            return self._ids[token]

    def text_of(self, number: int) -> str:
        return self._texts[number] if 0 <= number < len(self._texts) else f" token{number}"

    def pieces(self, text: str) -> list[dict[str, Any]]:
        """The tokens by number, as llama.cpp gives them; a character beyond U+FFFF is two, each a part of it."""
        out: list[dict[str, Any]] = []
        for token in self.tokens(text):
            data = token.encode()
            if len(data) == 4 and len(token) == 1:
                for part, piece in enumerate((data[:2], data[2:])):
                    out.append({"id": self.id_of(f"{token}#{part}"), "piece": list(piece)})
            else:
                out.append({"id": self.id_of(token), "piece": token})
        return out

    def is_part(self, number: int) -> bool:
        return "#" in self.text_of(number)[1:]

    def everything(self, before: Sequence[str]) -> list[dict[str, Any]]:
        """Every token that was ever numbered, with its log-probability after `before`."""
        texts = list(enumerate(self._texts))
        return [{"id": number, "token": text, "logprob": self.logprob(before, text)} for number, text in texts]

    def likeliest(self, before: Sequence[str]) -> str:
        return f" {self.words[self._dice('next', *before[-3:]) % len(self.words)]}"

    def logprob(self, before: Sequence[str], token: str) -> float:
        """log p(token | before), in nats: at most -0.1 for the likeliest, -1 and less for any other."""
        spread = (self._dice("spread", *before[-3:], token) % 1000) / 1000
        if token == self.likeliest(before):
            return -0.1 - 0.8 * spread
        word = token.strip().casefold()
        known = any(word == other.strip().casefold() for other in before)
        return (-1.0 if known else -6.0) - 2.0 * spread

    def generate(self, prompt: str, count: int) -> list[tuple[str, float]]:
        before = self.tokens(prompt)
        out: list[tuple[str, float]] = []
        for _ in range(count):
            token = self.likeliest(before)
            out.append((token, self.logprob(before, token)))
            before.append(token)
        return out

    def score(self, tokens: Sequence[str], before: Sequence[str] = ()) -> list[float]:
        """The log-probability of each token after `before` and the tokens in front of it."""
        context = list(before)
        out: list[float] = []
        for token in tokens:
            out.append(self.logprob(context, token))
            context.append(token)
        return out

    @staticmethod
    def _dice(*parts: str) -> int:
        return int.from_bytes(hashlib.sha256("\x00".join(parts).encode()).digest()[:4], "big")


class Generation:
    """One chat or completion: the body of its answer."""

    def __init__(self, toy: ToyModel, scores: Scores, *, chat: bool, body: dict[str, Any], usage: bool) -> None:
        self._toy = toy
        self._scores: Scores = scores
        self._chat = chat
        self._body = body
        self._usage = usage
        self._prompt = _prompt_text(body)

    @property
    def scoring(self) -> bool:
        """Whether it measures given text, by a parameter that this server obeys; no script is asked about that."""
        if self._chat:
            return False
        match self._scores:
            case "echo" | "shifted":
                return bool(self._body.get("echo"))
            case "grammar":
                return bool(self._body.get("grammar"))
            case "prompt_logprobs":
                return self._body.get("prompt_logprobs") is not None
            case _:
                return False

    @property
    def forces_parts(self) -> bool:
        """Whether its grammar wants a part of a character, which llama.cpp's server fails on."""
        numbers = re.findall(r"<\[(\d+)\]>", str(self._body.get("grammar") or ""))
        return self._scores == "grammar" and any(self._toy.is_part(int(number)) for number in numbers)

    def body_of(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        if isinstance(answer, Mapping) and "choices" in answer:
            return dict(answer)
        if self._chat:
            return self._chat_body(answer)
        given: Any = self._body.get("prompt")
        prompts = _prompts(given)
        n = int(self._body.get("n") or 1)
        if prompts == [given] and n == 1:
            return self._completion_body(answer)
        bodies = [
            Generation(
                self._toy, self._scores, chat=False, body={**self._body, "prompt": prompt, "n": 1}, usage=self._usage
            ).body_of(answer)
            for prompt in prompts
            for _ in range(n)
        ]
        whole = dict(bodies[0])
        whole["choices"] = [{**body["choices"][0], "index": place} for place, body in enumerate(bodies)]
        if self._usage:
            counted = ("prompt_tokens", "completion_tokens", "total_tokens")
            whole["usage"] |= {name: sum(body["usage"][name] for body in bodies) for name in counted}
        return whole

    def _frame(self, choice: dict[str, Any], generated: int) -> dict[str, Any]:
        digest = hashlib.sha256(orjson.dumps(self._body, option=orjson.OPT_SORT_KEYS)).hexdigest()
        asked = len(self._toy.tokens(self._prompt))
        frame: dict[str, Any] = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{digest[:12]}",
            "object": "chat.completion" if self._chat else "text_completion",
            "created": 1_700_000_000,
            "model": self._body.get("model", "scripted"),
            "choices": [choice],
        }
        if self._usage:
            frame["usage"] = {
                "prompt_tokens": asked,
                "completion_tokens": generated,
                "total_tokens": asked + generated,
                "prompt_tokens_details": {"cached_tokens": 0},
                "completion_tokens_details": {"reasoning_tokens": 0},
            }
        return frame

    def _chat_body(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        if answer is None:
            answer = f"scripted {hashlib.sha256(self._prompt.encode()).hexdigest()[:12]}"
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        message |= {"content": answer} if isinstance(answer, str) else dict(answer)
        finish = message.pop("finish_reason", None) or ("tool_calls" if message.get("tool_calls") else "stop")
        tokens = self._toy.tokens(message["content"] or "")
        logprobs = None
        if self._body.get("logprobs"):
            before = self._toy.tokens(self._prompt)
            logprobs = {"content": self._entries(before, tokens), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}
        return self._frame(choice, len(tokens))

    def _entries(self, before: Sequence[str], tokens: Sequence[str]) -> list[dict[str, Any]]:
        def entry(token: str, value: float) -> dict[str, Any]:
            number = self._toy.id_of(token)
            return {"id": number, "token": token, "bytes": list(token.encode()), "logprob": value}

        out: list[dict[str, Any]] = []
        context = list(before)
        for token, value in zip(tokens, self._toy.score(tokens, before), strict=True):
            first = self._toy.likeliest(context)
            top = [entry(first, self._toy.logprob(context, first))]
            if token != first:
                top.append(entry(token, value))
            out.append({**entry(token, value), "top_logprobs": top})
            context.append(token)
        return out

    def _completion_body(self, answer: str | Mapping[str, Any] | None) -> dict[str, Any]:
        body, toy = self._body, self._toy
        given = body.get("prompt")
        prompt: list[str] = []
        for part in cast("list[str | int]", given if isinstance(given, list) else [self._prompt]):
            prompt += [toy.text_of(part)] if isinstance(part, int) else toy.tokens(part)
        wanted = body.get("max_tokens")
        most = 16 if wanted is None else int(wanted)
        numbers = [int(n) for n in re.findall(r"<\[(\d+)\]>", str(body.get("grammar") or ""))]
        forced = [toy.text_of(number) for number in numbers]
        finish = "length"
        if self.scoring and self._scores == "grammar":
            tokens = forced[:most]
        elif isinstance(answer, Mapping):
            tokens, finish = toy.tokens(str(answer.get("content", ""))), str(answer.get("finish_reason", "stop"))
        elif answer is not None:
            tokens, finish = toy.tokens(answer), "stop"
        else:
            tokens = [token for token, _ in toy.generate(self._prompt, most)]
            stops: Any = body.get("stop") or []
            for stop in cast("list[str]", [stops] if isinstance(stops, str) else stops):
                text = "".join(tokens)
                if stop in text:
                    tokens, finish = toy.tokens(text[: text.index(stop)]), "stop"
        echoed = self.scoring and self._scores in ("echo", "shifted")
        text = "".join(tokens)
        choice: dict[str, Any] = {
            "index": 0,
            "text": self._prompt + text if echoed else text,
            "logprobs": None,
            "finish_reason": finish,
        }
        if body.get("logprobs") is not None or body.get("n_probs"):
            if self._scores == "grammar":
                entries = self._entries(prompt, tokens)
                if entries and int(body.get("n_probs") or 0) > 100:
                    entries[0]["top_logprobs"] = toy.everything(prompt)
                choice["logprobs"] = {"content": entries}
            else:
                choice["logprobs"] = self._legacy(prompt, tokens, echoed=echoed)
        if self.scoring and self._scores == "prompt_logprobs":
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt)
        return self._frame(choice, len(tokens))

    def _legacy(self, prompt: Sequence[str], tokens: Sequence[str], *, echoed: bool) -> dict[str, Any]:
        values: list[float | None] = [*self._toy.score(tokens, prompt)]
        shown = list(tokens)
        if echoed:
            before: list[float | None] = [*self._toy.score(prompt)]
            if self._scores == "shifted":
                before = [self._toy.logprob(prompt[: i + 1], token) for i, token in enumerate(prompt)]
            if before:
                before[0] = None
            values, shown = before + values, [*prompt, *tokens]
        offsets: list[int] = []
        at = 0 if echoed else len(self._prompt)
        for token in shown:
            offsets.append(at)
            at += len(token)
        top = [None if v is None else {t: v} for t, v in zip(shown, values, strict=True)]
        return {"tokens": shown, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}

    def _prompt_logprobs(self, prompt: Sequence[str]) -> list[dict[str, Any] | None]:
        out: list[dict[str, Any] | None] = []
        for i, (token, value) in enumerate(zip(prompt, self._toy.score(prompt), strict=True)):
            entry = {"logprob": value, "rank": 1, "decoded_token": token}
            out.append({str(self._toy.id_of(token)): entry} if i else None)
        return out


def _prompts(given: Any) -> list[Any]:
    """The prompts of a completion: one, of text or of tokens or, llama.cpp's way, of both; or a list of them."""
    parts: list[Any] = cast("list[object]", given) if isinstance(given, list) else []
    return parts if parts and not any(isinstance(part, int) for part in parts) else [given]


def _prompt_text(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        return "".join(part for part in cast("list[object]", prompt) if isinstance(part, str))
    texts: list[str] = []
    for message in cast("list[dict[str, Any]]", body.get("messages") or []):
        content = message.get("content")
        if isinstance(content, str):
            texts.append(content)
        elif isinstance(content, list):
            texts += [str(part.get("text", "")) for part in cast("list[dict[str, Any]]", content)]
    return "\n".join(texts)


def embeddings(toy: ToyModel, body: Mapping[str, Any]) -> dict[str, Any]:
    given: Any = body.get("input")
    texts = [piece if isinstance(piece, str) else "".join(map(toy.text_of, piece)) for piece in pieces(given)]
    data: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        raw = [byte / 127.5 - 1 for byte in hashlib.sha256(text.encode()).digest()[:8]]
        length = math.sqrt(math.fsum(x * x for x in raw))
        vector: list[float] | str = [x / length for x in raw]
        if body.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    asked = sum(len(toy.tokens(text)) for text in texts)
    usage = {"prompt_tokens": asked, "total_tokens": asked}
    return {"object": "list", "data": data, "model": body.get("model", "scripted"), "usage": usage}


def chunks_of(whole: Mapping[str, Any], *, include_usage: bool) -> Iterable[dict[str, Any]]:
    """The chunks of a stream that adds up to the body."""
    chat = whole.get("object", "chat.completion") == "chat.completion"
    frame: dict[str, Any] = {k: v for k, v in whole.items() if k not in ("choices", "usage")}
    if chat:
        frame["object"] = "chat.completion.chunk"
    if include_usage:
        frame["usage"] = None
    for choice in cast("list[dict[str, Any]]", whole["choices"]):
        place = {"index": choice.get("index", 0)}
        parts = _chat_parts(choice) if chat else _text_parts(choice)
        for part in parts:
            yield {**frame, "choices": [{**place, "finish_reason": None, **part}]}
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield {**frame, "choices": [{**place, **last, "finish_reason": choice.get("finish_reason", "stop")}]}
    if include_usage:
        yield {**frame, "choices": [], "usage": whole.get("usage")}


def _text_parts(choice: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    shape = cast("dict[str, list[Any]]", choice.get("logprobs") or {})
    for i, token in enumerate(ToyModel.tokens(choice.get("text") or "")):
        part = {name: values[i : i + 1] for name, values in shape.items() if i < len(values)}
        yield {"text": token, "logprobs": part or None}


def _chat_parts(choice: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    message = cast("dict[str, Any]", choice.get("message") or {})
    yield {"delta": {"role": "assistant", "content": ""}}
    for name in ("reasoning_content", "reasoning"):
        for piece in ToyModel.tokens(message.get(name) or ""):
            yield {"delta": {name: piece}}
    logprobs = cast("dict[str, Any]", choice.get("logprobs") or {})
    entries = cast("list[dict[str, Any]]", logprobs.get("content") or [])
    for i, piece in enumerate(ToyModel.tokens(message.get("content") or "")):
        part: dict[str, Any] = {"delta": {"content": piece}}
        if i < len(entries):
            part["logprobs"] = {"content": [entries[i]]}
        yield part
    if message.get("refusal"):
        yield {"delta": {"refusal": message["refusal"]}}
    for index, c in enumerate(cast("list[dict[str, Any]]", message.get("tool_calls") or [])):
        function = cast("dict[str, Any]", c.get("function") or {})
        head = {"name": function.get("name"), "arguments": ""}
        yield {"delta": {"tool_calls": [{"index": index, "id": c.get("id"), "type": "function", "function": head}]}}
        for piece in cut(str(function.get("arguments") or ""), 4):
            yield {"delta": {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}}


def cut(text: str, most: int) -> list[str]:
    size = math.ceil(len(text) / most)
    return [text[i : i + size] for i in range(0, len(text), size)] if text else []
