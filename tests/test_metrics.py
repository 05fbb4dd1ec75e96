"""What is measured, what Prometheus and an OTLP receiver get of it, and that nobody can make it grow."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric
from prometheus_client.parser import text_string_to_metric_families
from tests.serving import Server, eventually, serving, upstream

from asmodel.calls import Reply, Usage
from asmodel.errors import LimitExceeded, UpstreamRateLimited, UpstreamTimeout
from asmodel.meter import UNMEASURED
from asmodel.metric_store import FOLDER, OTHER, SERIES, Family, Instrument, Names, Numbers, shared_folder
from asmodel.metrics import FAMILIES, Metrics, exported
from asmodel.testing import Fault, ScriptedServer

ROOT = Path(__file__).resolve().parent.parent

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


def read(page: str) -> Samples:
    """A page as Prometheus's own parser understands it: values by sample name and labels."""
    samples: Samples = {}
    for family in text_string_to_metric_families(page):
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation, family.name
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            values = samples.setdefault(sample.name, {})
            assert labels not in values, f"{sample.name} {sample.labels} is there twice"
            values[labels] = sample.value
    return samples


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum over all samples of the name that have these labels."""
    return sum(v for k, v in samples.get(name, {}).items() if labels.items() <= dict(k).items())


USAGE = Usage(prompt_tokens=100, completion_tokens=20, cached_tokens=60, reasoning_tokens=5)


def made(folder: Path | None = None) -> Metrics:
    metrics = Metrics(folder, version="1.2.3")
    metrics.knows_program("evidence-qa", ["verdict", "thought"])
    metrics.knows_upstream("fast", provider="openai", model="m", address="https://models.test/v1", slots=4)
    return metrics


def use(metrics: Metrics) -> None:
    """Everything that can be recorded, once or twice."""
    with metrics.run("evidence-qa", nested=False):
        with metrics.step("evidence-qa", "verdict") as step:
            with metrics.call("fast", kind="chat", program="evidence-qa") as call:
                reply = Reply(text="yes", usage=USAGE, cost=0.25)
                metrics.bought("fast", "evidence-qa", USAGE, 0.25)
                call.replied(reply, first_chunk=0.03)
            step.replied(reply)
        with metrics.step("evidence-qa", "verdict") as step:
            step.replied(reply.named("hit"))
        with metrics.step("evidence-qa", "thought") as step:
            step.replied(reply, cache="refresh")
        metrics.asked_again("evidence-qa", "verdict")
    with metrics.run("evidence-qa", nested=True) as run:
        run.limited("calls")
    with pytest.raises(LimitExceeded), metrics.run("evidence-qa", nested=False):
        raise LimitExceeded("no more", param="tokens")
    with pytest.raises(asyncio.CancelledError), metrics.step("evidence-qa", "thought"):
        raise asyncio.CancelledError
    with pytest.raises(UpstreamTimeout), metrics.call("fast", kind="score", program=""):
        raise UpstreamTimeout("late")
    metrics.bought("fast", "", USAGE, None)
    metrics.attempted("fast")
    metrics.attempted("fast", UpstreamRateLimited("slower"))
    metrics.retried("fast", UpstreamRateLimited("slower"), 0.5)
    metrics.failed_over("fast", UpstreamTimeout("late"))
    metrics.queued("fast", 1)
    metrics.in_flight("fast", 1)
    metrics.waited("fast", 0.3)
    metrics.joined("fast", 0.1)
    metrics.stored("get", 0.0002)
    metrics.refused("body_bytes")
    metrics.requested("GET", "http", 1)
    metrics.streaming(1)
    metrics.knows_routes("/v1/models")
    metrics.responded("GET", "http", "/v1/models", 200, 0.02)
    metrics.watch("disk", lambda: {"late": 3, "unstored": 0})


# ---- the page ----


def test_prometheus_own_parser_reads_every_metric_there_is() -> None:
    metrics = made()
    use(metrics)
    page = metrics.text()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for family in FAMILIES:
        found = families[family.exposed.removesuffix("_total")]
        assert (found.type, found.documentation) == (family.kind, family.help)
    samples = read(page)
    call = "gen_ai_client_operation_duration_seconds"
    server = {"server_address": "models.test", "server_port": "443", "gen_ai_request_model": "m"}
    assert total(samples, f"{call}_count", gen_ai_operation_name="chat", **server) == 1
    assert total(samples, f"{call}_count", gen_ai_operation_name="text_completion", error_type="upstream_timeout") == 1
    assert total(samples, "gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 100
    assert total(samples, "gen_ai_client_operation_time_to_first_chunk_seconds_sum") == 0.03
    assert total(samples, "asmodel_runs_total", outcome="ok", nested="false") == 1
    assert total(samples, "asmodel_runs_total", outcome="limited", nested="true") == 1
    assert total(samples, "asmodel_runs_total", outcome="error", error_type="limit_exceeded") == 1
    assert total(samples, "asmodel_runs_active") == 0
    results = {"miss": 1.0, "hit": 1.0, "bypass": 1.0, "cancelled": 1.0}
    assert {r: total(samples, "asmodel_steps_total", cache=r) for r in results} == results
    assert total(samples, "asmodel_tokens_total", type="input", program="evidence-qa") == 100
    assert total(samples, "asmodel_tokens_total", type="input") == 200
    assert total(samples, "asmodel_cost_usd_total") == 0.25
    assert total(samples, "asmodel_calls_unpriced_total") == 1
    assert total(samples, "asmodel_tokens_saved_total", type="output", step="verdict") == 20
    assert total(samples, "asmodel_cost_saved_usd_total") == 0.25
    assert {r: total(samples, "asmodel_refusals_total", limit=r) for r in ("tokens", "calls", "body_bytes")} == {
        "tokens": 1,
        "calls": 0,  # a nested run's limit is its outermost run's, which counts it
        "body_bytes": 1,
    }
    assert total(samples, "asmodel_upstream_attempts_total", error_type="upstream_rate_limited") == 1
    assert total(samples, "asmodel_upstream_backoff_seconds_total") == 0.5
    assert total(samples, "asmodel_upstream_slots") == 4
    assert total(samples, "asmodel_cache_troubles_total", store="disk", kind="late") == 3
    assert total(samples, "asmodel_workers", version="1.2.3") == 1
    assert total(samples, "process_cpu_seconds_total") > 0
    if sys.platform.startswith("linux"):
        assert 1e6 < total(samples, "process_resident_memory_bytes") < 1e10
        assert 2 < total(samples, "process_open_fds") < 10_000


def test_buckets_are_those_of_the_conventions_and_add_up() -> None:
    metrics = made()
    for seconds in (0.01, 0.010001, 81.92, 500.0):
        metrics.call_seconds.observe(("chat", "openai", "m", "models.test", "443", "fast", ""), seconds)
    buckets: dict[str, float] = {}
    for labels, value in read(metrics.text())["gen_ai_client_operation_duration_seconds_bucket"].items():
        buckets[dict(labels)["le"]] = value
    assert list(buckets)[:3] == ["0.01", "0.02", "0.04"]
    assert len(buckets) == 15
    # A bound belongs to its own bucket.
    assert (buckets["0.01"], buckets["0.02"], buckets["81.92"], buckets["+Inf"]) == (1, 2, 3, 4)
    tokens = next(family for family in FAMILIES if family.name == "gen_ai.client.token.usage")
    assert tokens.bounds[0] == 1
    assert tokens.bounds[-1] == 67_108_864


def test_a_label_may_hold_any_character() -> None:
    metrics = Metrics()
    odd = 'a "quoted" \\ back\\nslash\nand a line é 語'
    metrics.knows_upstream(odd, provider="p", model="m")
    metrics.attempted(odd)
    assert total(read(metrics.text()), "asmodel_upstream_attempts_total", upstream=odd) == 1


def test_what_has_not_happened_yet_stands_at_0_so_that_its_first_increase_is_seen() -> None:
    samples = read(made().text())
    assert samples["asmodel_runs_total"].values()
    assert total(samples, "asmodel_runs_total") == total(samples, "asmodel_upstream_attempts_total") == 0
    assert not [labels for values in samples.values() for labels in values if OTHER in dict(labels).values()]


def test_without_metrics_recording_does_nothing() -> None:
    with UNMEASURED.run("x", nested=False) as run, UNMEASURED.call("y", kind="chat", program="x") as call:
        run.limited("calls")
        call.replied(Reply())
    UNMEASURED.bought("y", "x", USAGE, None)


# ---- that it does not grow ----


def test_names_that_nobody_has_set_share_one_series() -> None:
    metrics = made()
    use(metrics)
    before = metrics.text().count("\n")
    for number in range(3_000):
        name = f"{'x' * 300}{number}"
        with metrics.run(name, nested=False), metrics.call(name, kind=name, program=name):
            metrics.bought(name, name, USAGE, 1.0)
        metrics.attempted(name)
        metrics.queued(name, 1)
        metrics.responded(name, name, name, 200, 0.1)
        metrics.requested(name, name, 1)
    page = metrics.text()
    assert "xxx" not in page
    assert page.count("\n") - before < 120, "some series for everything else, and no more however many there are"
    samples = read(page)
    assert total(samples, "asmodel_runs_total", program=OTHER) == 3_000
    assert total(samples, "asmodel_tokens_total", program=OTHER, upstream=OTHER, type="input") == 300_000


def test_names_that_a_program_makes_up_as_it_runs_are_told_apart_only_so_far() -> None:
    metrics = made()
    for number in range(2_000):
        with metrics.step("evidence-qa", f"step {number}") as step:
            step.replied(Reply())
        with pytest.raises(Exception), metrics.run("evidence-qa", nested=False):  # noqa: B017, PT011
            raise type(f"Error{number}", (Exception,), {})
    samples = read(metrics.text())
    assert total(samples, "asmodel_steps_total") == total(samples, "asmodel_runs_total") == 2_000
    assert total(samples, "asmodel_steps_total", step=OTHER) > 1_500
    assert len(samples["asmodel_steps_total"]) < 300
    assert len(samples["asmodel_runs_total"]) < 100


def test_a_family_has_a_highest_number_of_series_and_a_map_that_is_full_loses_no_count() -> None:
    family = Family("many", "counter", "Many.", ("a", "b"))
    for capacity, most in ((1 << 20, SERIES + 1), (4096, 120)):
        numbers = Numbers(capacity=capacity)
        many = Instrument(numbers, family, (Names(room=10_000), Names(room=10_000)))
        for a in range(60):
            for b in range(60):
                many.add((f"a{a}", f"b{b}"))
        sums = numbers.total(frozenset())["many"]
        assert len(sums) <= most
        assert sum(values[0] for values in sums.values()) == 3_600
        assert sums[OTHER, OTHER][0] > 0


# ---- several processes ----

COUNTING = """
import sys, time
from pathlib import Path
from asmodel.metrics import Metrics
metrics = Metrics(Path(sys.argv[1]), version="1")
metrics.knows_program("p", ["s"])
metrics.knows_upstream("u", provider="openai", model="m")
for _ in range(int(sys.argv[2])):
    with metrics.run("p", nested=False):
        metrics.attempted("u")
metrics.in_flight("u", 2)
metrics.waited("u", 0.5)
metrics.watch("disk", lambda: {"late": 1})
metrics.observe()
print("counted", flush=True)
time.sleep(60)
"""


@contextmanager
def counting(folder: Path, runs: int) -> Generator[Callable[[], None]]:
    """A process that has counted so many runs and lives on; gives what kills it, as it is killed afterwards anyway."""
    command = [sys.executable, "-c", COUNTING, str(folder), str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def kill() -> None:
            process.kill()
            process.wait()

        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "counted\n"
            yield kill
        finally:
            kill()


@pytest.fixture
def folder() -> Iterator[Path]:
    with shared_folder() as variables:
        yield Path(variables[FOLDER])


def test_any_process_answers_for_all_and_what_a_killed_one_has_counted_stays(folder: Path) -> None:
    def seen(metrics: Metrics) -> list[float]:
        samples = read(metrics.text())
        names = ("asmodel_runs_total", "asmodel_upstream_calls_active", "asmodel_workers")
        late = total(samples, "asmodel_cache_troubles_total", kind="late")
        return [*(total(samples, name) for name in names), late]

    with counting(folder, 100) as kill_one, counting(folder, 23) as kill_two:
        here = Metrics(folder, version="1")
        assert seen(here) == [123, 4, 2 + 1, 2]
        cpu = total(read(here.text()), "process_cpu_seconds_total")

        kill_one()
        # Calls in flight died with it, and the counts did not.
        assert seen(here) == [123, 2, 1 + 1, 2]
        assert total(read(here.text()), "process_cpu_seconds_total") >= cpu

        with counting(folder, 7):
            assert seen(here) == [130, 4, 3, 3]
            assert len(list(folder.iterdir())) == 3, "it goes on with the file of the one that was killed"
            assert total(read(here.text()), "asmodel_upstream_queue_wait_seconds_count") == 3
        kill_two()
        assert seen(here) == [130, 0, 1, 3]
        here.close()
        last = Metrics(folder, version="1")
        assert seen(last) == [130, 0, 1, 3]


def test_a_process_that_goes_on_with_a_file_reports_only_its_own_counts_to_a_collector(folder: Path) -> None:
    first = made(folder)
    use(first)
    first.close()
    second = made(folder)
    second.attempted("fast")
    own = {(family.name, labels): values[0] for family, labels, values in second.own() if any(values)}
    assert own["asmodel.upstream.attempts", ("fast", "")] == 1
    assert ("asmodel.runs", ("evidence-qa", "false", "ok", "")) not in own
    assert total(read(second.text()), "asmodel_upstream_attempts_total", upstream="fast") == 3


def test_a_page_is_whole_while_others_record(folder: Path) -> None:
    writer, reader = made(folder), made(folder)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            with writer.step("evidence-qa", f"new {number}") as step:
                step.replied(Reply())
            writer.waited("fast", 0.1)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        counts: list[float] = []
        for _ in range(100):
            samples = read(reader.text())
            infinite = total(samples, "asmodel_upstream_queue_wait_seconds_bucket", le="+Inf")
            assert infinite == total(samples, "asmodel_upstream_queue_wait_seconds_count")
            counts.append(total(samples, "asmodel_steps_total"))
        assert counts == sorted(counts)
        assert counts[-1] > 0
    finally:
        stop.set()
        thread.join()


def test_the_folder_is_the_users_own_and_gone_afterwards() -> None:
    with shared_folder() as variables:
        folder = Path(variables[FOLDER])
        assert folder.stat().st_mode & 0o777 == 0o700
        metrics = made(folder)
        assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
    assert not folder.exists()
    metrics.attempted("fast")  # a task that ends late harms nothing


def test_a_folder_that_cannot_be_used_costs_the_sums_and_not_the_metrics(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o755)
    for folder in (tmp_path, tmp_path / "nowhere"):
        metrics = made(folder)
        metrics.attempted("fast")
        assert total(read(metrics.text()), "asmodel_upstream_attempts_total") == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "0700" in caplog.text


# ---- OTLP ----


class Sink:
    """A collector on the loopback interface: what it was sent, decoded."""

    def __init__(self, status: int = 200) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.path.partition("?")[0] == "/v1/metrics"
                sink.requests.append(ExportMetricsServiceRequest.FromString(body))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def metrics(self, request: int = -1) -> dict[str, Metric]:
        (resource,) = self.requests[request].resource_metrics
        (scope,) = resource.scope_metrics
        assert (scope.scope.name, scope.schema_url) == ("asmodel", "https://opentelemetry.io/schemas/1.41.0")
        return {metric.name: metric for metric in scope.metrics}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def sink() -> Iterator[Sink]:
    sink = Sink()
    yield sink
    sink.close()


def attributes(point: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in point.attributes}


def test_a_collector_gets_the_metrics_by_their_opentelemetry_names(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{sink.address}/v1/metrics")
    metrics = made()
    use(metrics)
    export = exported(metrics, os.environ)
    assert export is not None
    assert export.shutdown()
    assert len(sink.requests) == 1, "once more at the end, so that a short life is not lost"
    found = sink.metrics()
    assert {family.name for family in FAMILIES if family.kind != "gauge"} <= found.keys()

    call = found["gen_ai.client.operation.duration"]
    assert call.unit == "s"
    assert call.histogram.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    chat = next(p for p in call.histogram.data_points if attributes(p)["gen_ai.operation.name"] == "chat")
    assert attributes(chat) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "m",
        "server.address": "models.test",
        "server.port": 443,
        "asmodel.upstream.name": "fast",
    }
    assert list(chat.explicit_bounds) == pytest.approx([0.01 * 2**k for k in range(14)])
    assert chat.count == sum(chat.bucket_counts) == 1
    assert not chat.HasField("min")

    tokens = found["asmodel.tokens"].sum
    assert tokens.is_monotonic
    assert {(attributes(p).get("program"), p.as_double) for p in tokens.data_points if p.as_double == 100} == {
        ("evidence-qa", 100),
        (None, 100),
    }
    assert not found["asmodel.upstream.queue.depth"].sum.is_monotonic
    resource = {a.key: a.value.string_value for a in sink.requests[0].resource_metrics[0].resource.attributes}
    assert resource["service.name"] == "asmodel"
    assert resource["service.instance.id"]


def test_a_collector_may_want_increases_instead_of_sums(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sink.address)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "delta")
    metrics = made()
    export = exported(metrics, os.environ)
    assert export is not None
    for times in (3, 2):
        for _ in range(times):
            metrics.attempted("fast")
        export.send()
        attempts = sink.metrics()["asmodel.upstream.attempts"].sum
        assert attempts.aggregation_temporality == AggregationTemporality.AGGREGATION_TEMPORALITY_DELTA
        assert [p.as_double for p in attempts.data_points] == [times]
    export.send()
    assert "asmodel.upstream.attempts" not in sink.metrics()
    assert export.shutdown()


def test_metrics_are_sent_at_the_interval_that_is_set(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{sink.address}/v1/metrics")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
    export = exported(made(), os.environ)
    assert export is not None
    eventually("metrics arrive again and again", lambda: len(sink.requests) >= 3)
    assert export.shutdown()


def test_an_outage_of_the_collector_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Sink(status=400)
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"{sink.address}/v1/metrics?key=secret")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
        with caplog.at_level(logging.INFO):
            export = exported(made(), os.environ)
            assert export is not None
            eventually("it is tried again and again", lambda: len(sink.requests) >= 3)
            export.shutdown()
    finally:
        sink.close()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert re.match(r"metrics are not delivered to 127\.0\.0\.1:\d+ ", lines[0])
    assert "secret" not in caplog.text


def test_the_end_does_not_wait_for_a_collector_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:9/v1/metrics")
    export = exported(made(), os.environ)
    assert export is not None
    began = time.monotonic()
    export.shutdown(timeout=1.0)
    assert time.monotonic() - began < 5
    assert len(caplog.records) <= 1


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"},  # a Jaeger, which refuses metrics
        {"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318"},
        {"OTEL_METRICS_EXPORTER": "prometheus"},
        {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    ],
)
def test_nothing_is_sent_unless_it_is_asked_for(variables: Mapping[str, str]) -> None:
    code = (
        "import os, sys\nfrom asmodel.metrics import Metrics, exported\n"
        "assert exported(Metrics(), os.environ) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry.sdk')], 'the SDK is imported'"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, check=True, timeout=30)


def test_an_exporter_that_is_not_known_is_named(caplog: pytest.LogCaptureFixture) -> None:
    assert exported(Metrics(), {"OTEL_METRICS_EXPORTER": "statsd"}) is None
    assert "statsd" in caplog.text


# ---- a server ----

PIECES = """
from asmodel import Run, program, step


@step(temperature=0)
def piece(question: str) -> str:
    return question


@program("pieces")
async def pieces(run: Run) -> str:
    return await run.reply(piece, run.question)
"""


def ask(server: Server, question: str, model: str = "pieces", **more: object) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": question}], **more}
    return server.chat(body).status


def scrape(server: Server) -> Samples:
    page = server.ask("GET", "/metrics")
    assert page.status == 200, page.body
    assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return read(page.body.decode())


@pytest.fixture
def up() -> Iterator[ScriptedServer]:
    with ScriptedServer(keep=10_000) as server:
        yield server


def served(
    tmp_path: Path, up: ScriptedServer, *arguments: str, concurrency: int = 64
) -> AbstractContextManager[Server]:
    (tmp_path / "programs").mkdir(exist_ok=True)
    (tmp_path / "programs" / "pieces.py").write_text(PIECES)
    settings = 'program_folders = ["programs"]\n' + upstream(up.base_url, concurrency=concurrency)
    return serving(tmp_path, settings, *arguments)


def test_what_a_server_has_answered_is_on_its_page(tmp_path: Path, up: ScriptedServer) -> None:
    with served(tmp_path, up) as server:
        first = server.chat({"model": "pieces", "messages": [{"role": "user", "content": "one"}]}).json
        assert ask(server, "one") == ask(server, "two", stream=True) == ask(server, "three", model="default") == 200
        assert ask(server, "x", model="no-such-model") == 404
        assert ask(server, "x", n=17) == 400
        samples = scrape(server)
    assert total(samples, "asmodel_runs_total", program="pieces", outcome="ok") == 3
    steps = {r: total(samples, "asmodel_steps_total", step="piece", cache=r) for r in ("hit", "miss")}
    assert steps == {"hit": 1, "miss": 2}
    assert total(samples, "asmodel_steps_total", step="default", cache="bypass") == 1
    assert total(samples, "asmodel_upstream_attempts_total", upstream="default") == len(up.requests) == 3
    assert total(samples, "gen_ai_client_operation_duration_seconds_count", gen_ai_request_model="scripted") == 3
    assert total(samples, "gen_ai_client_operation_time_to_first_chunk_seconds_count") == 1
    bought = total(samples, "asmodel_tokens_total", program="pieces", type="input")
    assert bought == 2 * first["usage"]["prompt_tokens"]
    assert total(samples, "asmodel_tokens_saved_total", type="input") == first["usage"]["prompt_tokens"]
    assert total(samples, "asmodel_refusals_total", limit="n") == 1
    route = {"http_route": "/v1/chat/completions"}
    request = "http_server_request_duration_seconds_count"
    assert {s: total(samples, request, http_response_status_code=s, **route) for s in ("200", "404", "400")} == {
        "200": 4,
        "404": 1,
        "400": 1,
    }
    for idle in ("asmodel_streams_open", "asmodel_runs_active", "asmodel_upstream_calls_active"):
        assert total(samples, idle) == 0, idle
    assert total(samples, "http_server_active_requests") == 1, "the scrape itself"


def test_queue_retries_and_joins_are_seen(tmp_path: Path) -> None:
    slow = ScriptedServer([Fault(status=429, headers={"retry-after": "0"}), None], delay=0.1)
    with slow as up, served(tmp_path, up, concurrency=1) as server, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(ask, server, question) for question in ("a", "a", "a", "b", "c", "d")]
        assert {one.result() for one in asked} == {200}
        samples = scrape(server)
    assert total(samples, "asmodel_upstream_retries_total", error_type="upstream_rate_limited") == 1
    assert total(samples, "asmodel_upstream_attempts_total") == len(up.requests) == 5
    assert total(samples, "asmodel_flight_wait_seconds_count") == total(samples, "asmodel_steps_total", cache="joined")
    assert total(samples, "asmodel_flight_wait_seconds_count") == 2
    assert total(samples, "asmodel_upstream_queue_wait_seconds_count") == 5
    assert total(samples, "asmodel_upstream_queue_wait_seconds_sum") > 0.2
    assert total(samples, "asmodel_upstream_queue_depth") == 0
    assert total(samples, "asmodel_upstream_slots", upstream="default") == 1


def test_a_client_cannot_make_series(tmp_path: Path, up: ScriptedServer) -> None:
    with served(tmp_path, up) as server:
        ask(server, "warm")
        server.ask("GET", "/v1/models/a")
        server.ask("GET", "/nowhere/a")
        ask(server, "x", model="nothing")
        scrape(server)
        before = {name: set(values) for name, values in scrape(server).items()}
        for number in range(50):
            ask(server, "x", model=f"pieces:{'pieces:' * number}marker")
            ask(server, "x", model=f"marker{number}")
            server.ask("GET", f"/v1/models/marker{number}")
            server.ask("GET", f"/marker/{number}?marker={number}", headers={"x-marker": str(number)})
        page = server.ask("GET", "/metrics").body.decode()
        after = {name: set(values) for name, values in read(page).items()}
    assert "marker" not in page
    new = {name: labels - before.get(name, set()) for name, labels in after.items()}
    assert {name for name, labels in new.items() if labels} <= {
        f"http_server_request_duration_seconds_{part}" for part in ("bucket", "sum", "count")
    }, "a status that had not been answered before"


def test_metrics_want_a_key_where_answers_do_unless_it_is_said_otherwise(tmp_path: Path, up: ScriptedServer) -> None:
    keys = '[keys]\nalice = "alice-key-1"\n[metrics]\nkey = "scraper-key-1"\n'
    with serving(tmp_path / "keyed", keys + upstream(up.base_url)) as server:
        assert server.ask("GET", "/metrics").status == 401
        for key, chat in (("alice-key-1", 200), ("scraper-key-1", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert server.ask("GET", "/metrics", headers=headers).status == 200
            body = {"model": "default", "messages": [{"role": "user", "content": "x"}]}
            assert server.chat(body, headers).status == chat
    open_ = '[keys]\nalice = "alice-key-1"\n[metrics]\nopen = true\n'
    with serving(tmp_path / "open", open_ + upstream(up.base_url)) as server:
        assert server.ask("GET", "/metrics").status == 200
    with serving(tmp_path / "local", upstream(up.base_url)) as server:
        assert server.ask("GET", "/metrics").status == 200
        assert server.ask("GET", "/metrics", headers={"host": "evil.test"}).status == 403


def workers(server: Server) -> list[int]:
    """The process ids of those that answer: children of the server's that hold its socket."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == server.process.pid and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_any_worker_answers_for_all_and_a_killed_one_takes_no_count_with_it(tmp_path: Path, up: ScriptedServer) -> None:
    with served(tmp_path, up, "--workers", "2") as server:
        eventually("both workers are there", lambda: total(scrape(server), "asmodel_workers") == 2)
        for number in range(40):
            assert ask(server, f"question {number}") == 200
        # Each scrape is a connection of its own, so either worker answers some.
        assert {total(scrape(server), "asmodel_runs_total", outcome="ok") for _ in range(10)} == {40}
        alive = workers(server)
        assert len(alive) == 2
        os.kill(alive[0], signal.SIGKILL)
        eventually("another takes its place", lambda: len(workers(server)) == 2 and alive[0] not in workers(server))
        eventually("it counts", lambda: total(scrape(server), "asmodel_workers") == 2)
        assert {total(scrape(server), "asmodel_runs_total", outcome="ok") for _ in range(10)} == {40}
        for number in range(20):
            assert ask(server, f"later {number}") == 200
        assert {total(scrape(server), "asmodel_runs_total", outcome="ok") for _ in range(10)} == {60}
        attempts = {total(scrape(server), "asmodel_upstream_attempts_total") for _ in range(10)}
        assert attempts == {len(up.requests)}
        assert server.stop() == 0


# ---- pages and dashboards ----


def expressions(dashboard: Mapping[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


@pytest.mark.parametrize("name", ["programs", "upstreams"])
def test_a_dashboard_asks_only_for_metrics_and_labels_that_there_are(name: str) -> None:
    dashboard = json.loads((ROOT / "docs" / "dashboards" / f"{name}.json").read_text(encoding="utf-8"))
    series: dict[str, set[str]] = {}
    for family in FAMILIES:
        labels = {label.replace(".", "_") for label in family.labels}
        if family.kind == "histogram":
            series |= {f"{family.exposed}_{part}": labels for part in ("sum", "count")}
            series[f"{family.exposed}_bucket"] = labels | {"le"}
        else:
            series[family.exposed] = labels
    functions = {
        "sum",
        "rate",
        "increase",
        "histogram_quantile",
        "label_values",
        "topk",
        "clamp_min",
        "by",
        "or",
        "vector",
    }
    asked = list(expressions(dashboard))
    assert len(asked) > 10
    for expression in asked:
        plain = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
        words = set(re.findall(r"\b[a-z_]+\b", plain)) - functions
        metrics = words & series.keys()
        assert metrics, expression
        known = set[str]().union(*(series[metric] for metric in metrics))
        assert words - metrics <= known | {"job", "instance"}, expression
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in dashboard["panels"] if panel["type"] != "row")


def test_the_page_on_metrics_lists_every_one_of_them() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1] for row in re.findall(r"^\| `([a-z_]+)` \| \w+ \| (.*?) \|", page, re.M)}
    assert rows == {
        family.exposed: ", ".join(f"`{label.replace('.', '_')}`" for label in family.labels) for family in FAMILIES
    }


# ---- what it costs ----


def test_a_record_costs_microseconds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = made(folder)
    reply = Reply(usage=USAGE, cost=0.1)

    def whole_call() -> None:
        metrics.queued("fast", 1)
        metrics.queued("fast", -1)
        metrics.waited("fast", 0.1)
        metrics.in_flight("fast", 1)
        metrics.attempted("fast")
        metrics.in_flight("fast", -1)
        with metrics.step("evidence-qa", "verdict") as step:
            with metrics.call("fast", kind="chat", program="evidence-qa") as call:
                metrics.bought("fast", "evidence-qa", USAGE, 0.1)
                call.replied(reply)
            step.replied(reply)

    costs: dict[str, float] = {}
    for what, work, times in (
        ("a counter", lambda: metrics.attempted("fast"), 20_000),
        ("a histogram", lambda: metrics.waited("fast", 0.1), 20_000),
        ("all of one bought step", whole_call, 5_000),
        ("a page", metrics.text, 20),
    ):
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(times):
                work()
            best = min(best, (time.perf_counter() - began) / times)
        costs[what] = best * 1e6
    with capsys.disabled():
        print("\n  metrics: " + ", ".join(f"{what} {cost:.2f} µs" for what, cost in costs.items()))
    assert costs["a counter"] < 10
    assert costs["all of one bought step"] < 100
    assert costs["a page"] < 100_000
