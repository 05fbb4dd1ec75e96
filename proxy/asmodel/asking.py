"""`asmodel run`: one question asked of a program without a server, by the same service that a server has."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from asmodel.app import Parts, build
from asmodel.calls import Delta, Message
from asmodel.errors import AsmodelError
from asmodel.preparing import prepared
from asmodel.service import Asked, Job, Outcome

if TYPE_CHECKING:
    from asmodel.settings import Settings


def ask(
    settings: Settings,
    program: str,
    question: str,
    params: Mapping[str, Any],
    *,
    upstream: str | None,
    as_json: bool,
    identity: str | None = None,
    plan: bool = False,
) -> int:
    """Print the answer to standard output, progress and the receipt to standard error; give the exit code.

    With `plan`, print what the run would find in the cache and what it would buy, and buy nothing. `identity` names the
    run, as a client's `Idempotency-Key` does.
    """
    parts = build(settings)
    name = program if upstream is None else f"{program}:{upstream}"
    parts.models.find(name)  # Before anything is fetched or started.
    asked = Asked(messages=(Message("user", question),), params=params, identity=identity)
    with prepared(parts):
        if plan:
            return asyncio.run(_plan(parts, name, asked, as_json=as_json))
        traces = parts.trace()
        try:
            return asyncio.run(_ask(parts, name, asked, as_json=as_json))
        except KeyboardInterrupt:
            return 130
        finally:
            traces.shutdown()


async def _plan(parts: Parts, name: str, asked: Asked, *, as_json: bool) -> int:
    try:
        await parts.open()
        plan = await parts.service.plan(name, asked)
    finally:
        await parts.close()
    saved = sum(step.tokens for step in plan.steps)
    if as_json:
        rows = [{"program": p, "step": s, "found": found, "to_buy": wanting} for p, s, found, wanting in plan.rows]
        counts = {"found": plan.count("hit"), "to_buy": plan.count("buy"), "tools": plan.count("tool")}
        click.echo(json.dumps({"steps": rows, **counts, "saved_tokens": saved, "whole": plan.whole}, indent=2))
        return 0
    for program, step, found, wanting in plan.rows:
        click.echo(f"{program}  {step}  {found} found" + (f", {wanting} to buy" if wanting else ""))
    if plan.error is not None:
        click.echo(f"It would end in an error: {plan.error}")
    elif plan.whole:
        click.echo(f"Nothing would be bought; the cache saves {_counted(saved, 'token')}.")
    else:
        wanted = plan.count("buy")
        tools = f", {_counted(plan.count('tool'), 'tool')} to be called" if plan.count("tool") else ""
        click.echo(f"{_counted(wanted, 'call')} to buy{tools}, and what follows from that, which is not known yet.")
    return 0


async def _ask(parts: Parts, name: str, asked: Asked, *, as_json: bool) -> int:
    try:
        await parts.open()
        model = parts.models.find(name)
        job = await parts.service.prepare(model, asked)
        spoken = False

        async def emit(delta: Delta) -> None:
            nonlocal spoken
            if delta.text and not as_json:
                if not spoken:
                    teller.clear()
                spoken = True
                click.echo(delta.text, nl=False)

        teller = _Teller(job, quiet=as_json)
        telling = asyncio.create_task(teller.tell())
        try:
            outcome = await parts.service.answer(job, 0, emit)
        except AsmodelError as error:
            teller.clear()
            if spoken:
                click.echo()
            click.echo(f"asmodel: {error}", err=True)
            click.echo(_line(job), err=True)
            return 1
        finally:
            telling.cancel()
            teller.clear()
        if as_json:
            click.echo(json.dumps(_json(job, outcome), indent=2, ensure_ascii=False))
            return 0
        click.echo("" if spoken else outcome.answer.text)
        for citation in outcome.answer.citations:
            click.echo(f"\n[{citation.id}] {citation.text}")
        click.echo(f"\n{_line(job)}", err=True)
        if parts.service.recordings is not None:
            click.echo(f"recorded: asmodel replay {job.id}", err=True)
        return 0
    finally:
        await parts.close()


class _Teller:
    """One line of standard error that says how far the run is; nothing where nobody watches."""

    def __init__(self, job: Job, *, quiet: bool) -> None:
        self._progress = job.progress
        self._on = sys.stderr.isatty() and not quiet
        self._shown = False

    async def tell(self) -> None:
        while self._on:
            line = None
            while (following := self._progress.next_line()) is not None:
                line = following
            if line is not None:
                click.echo(f"\r\x1b[2K\x1b[2m{line}\x1b[0m", nl=False, err=True)
                self._shown = True
            await asyncio.sleep(0.2)

    def clear(self) -> None:
        if self._shown:
            click.echo("\r\x1b[2K", nl=False, err=True)
        self._shown = self._on = False


def _line(job: Job) -> str:
    b = job.budget
    seconds = time.monotonic() - job.started
    cost = "" if not b.cost else f" · ${b.cost:.4f}"
    ours = max(0.0, seconds - b.upstream_seconds) * 1000
    tokens = b.usage.total_tokens
    counts = (_counted(b.steps, "step"), f"{b.hits} cached", _counted(b.calls, "call"), _counted(tokens, "token"))
    return f"{' · '.join(counts)}{cost} · {seconds:.2f} s, {ours:.0f} ms of it ours · asmodel trace {job.id}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _json(job: Job, outcome: Outcome) -> dict[str, Any]:
    b = job.budget
    return {
        "answer": outcome.answer.text,
        "finish_reason": outcome.answer.finish,
        "citations": [{"id": c.id, "text": c.text} for c in outcome.answer.citations],
        "data": outcome.answer.data,
        "run_id": job.id,
        "steps": b.steps,
        "cache_hits": b.hits,
        "upstream_calls": b.calls,
        "usage": {"prompt_tokens": b.usage.prompt_tokens, "completion_tokens": b.usage.completion_tokens},
        "cost": b.cost,
        "seconds": round(time.monotonic() - job.started, 4),
    }
