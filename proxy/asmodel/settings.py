"""Every setting there is: its name, its default, and one line on what it is for.

`load` reads them from `asmodel.toml`, the environment and the flags, and is the only thing here that reads anything:
`Settings(port=0)` in a test is those settings and the defaults, whatever the machine has set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from asmodel.budget import Limits
from asmodel.errors import ConfigurationError
from asmodel.mistakes import did_you_mean, is_secret, listed
from asmodel.sources import (
    INTERNAL,
    Mistakes,
    explained,
    read_environment,
    read_flags,
    read_toml,
    resolve_environment_references,
)

FILE = "asmodel.toml"


def _not_a_truth(value: object) -> object:
    # Python's True is the number 1; nobody who writes `workers = true` means that.
    if isinstance(value, bool):
        raise PydanticCustomError("int_type", "a number is expected")
    return value


def _name(value: str) -> str:
    if re.fullmatch(r"[a-z0-9-]+", value) is None:
        raise ValueError("a name is made of a-z, 0-9 and -")
    return value


def _upstream_name(value: str) -> str:
    if not value or re.search(r"[\s\x00-\x1f\x7f-\x9f]", value):
        raise ValueError("a name is not empty, and has no spaces or control characters in it")
    return value


def _page_address(value: str) -> str:
    if re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", value) is None:
        raise ValueError("the address of a page is expected: http:// or https://, host, port, path")
    return value


Whole: TypeAlias = Annotated[int, BeforeValidator(_not_a_truth)]
Number: TypeAlias = Annotated[float, BeforeValidator(_not_a_truth), Field(allow_inf_nan=False)]
Name: TypeAlias = Annotated[str, AfterValidator(_name)]
UpstreamName: TypeAlias = Annotated[str, AfterValidator(_upstream_name)]
PageAddress: TypeAlias = Annotated[str, AfterValidator(_page_address)]
Folder: TypeAlias = Annotated[Path, AfterValidator(Path.expanduser)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class _WithOptions(_Table):
    """A table of which every key that asmodel has no use for is an option of the plug-in."""

    options: dict[str, Any] = Field(
        default={},
        description="Every other key of the table goes to the plug-in as it is, and the plug-in refuses what it does "
        "not know. A table `options` holds those whose names are taken here.",
    )

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        table = cast("Mapping[str, Any]", data)
        options = table.get("options", {})
        if not isinstance(options, Mapping):
            return table
        apart = cast("Mapping[str, Any]", options)
        own = {key: value for key, value in table.items() if key in cls.model_fields and key != "options"}
        beside = {key: value for key, value in table.items() if key not in cls.model_fields}
        if twice := sorted(apart.keys() & beside.keys()):
            raise Mistakes([((key,), f'stands both here and in "options.{key}"; keep one') for key in twice])
        return {**own, "options": _veiled({**apart, **beside})}


def _veiled(value: object, name: str = "") -> object:
    """The options with `~` made the home folder, and with a SecretStr for each text that no log should show."""
    if isinstance(value, Mapping):
        return {key: _veiled(item, key) for key, item in cast("Mapping[str, object]", value).items()}
    if isinstance(value, list):
        return [_veiled(item, name) for item in cast("list[object]", value)]
    if isinstance(value, str):
        if is_secret(name, value):
            return SecretStr(value)
        if value == "~" or value.startswith("~/"):
            return os.path.expanduser(value)
    return value


class Price(_Table):
    """US dollars for a million tokens."""

    input: Number = Field(ge=0, description="US dollars for a million prompt tokens.")
    output: Number = Field(ge=0, description="US dollars for a million generated tokens.")
    cached_input: Number | None = Field(
        default=None,
        ge=0,
        description="US dollars for a million prompt tokens that the provider's own cache served.",
        json_schema_extra={"default_words": "as `input`"},
    )


class UpstreamSettings(_WithOptions):
    """One upstream: who answers, and on what terms it is asked."""

    kind: str = Field(
        default="",
        description="The plug-in: `openai`, `litellm`, `embedded`, another that is installed, or `module:attribute`.",
        json_schema_extra={
            "default_words": "`openai` with a `base_url`; `litellm` with a `model` alone; "
            "`embedded` with a `path`, or with none of these"
        },
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The key, or `env:NAME` to take it from an environment variable.",
        json_schema_extra={"default_words": "the provider's usual variable"},
    )
    concurrency: Whole = Field(default=64, ge=1, description="Calls in flight at once; more wait their turn.")
    connect_timeout: Number = Field(default=5, gt=0, description="Seconds for a connection to be made.")
    first_byte_timeout: Number = Field(default=60, gt=0, description="Seconds for the first byte of an answer.")
    timeout: Number = Field(default=600, gt=0, description="Seconds for a whole answer.")
    retries: Whole = Field(default=2, ge=0, description="Further attempts after one that failed and may be repeated.")
    price: Price | None = Field(
        default=None,
        description="What it costs. Without it the plug-in's own price counts, and if it has none the cost is unknown.",
    )
    equals: list[str] = Field(
        default=[], description="Names of other upstreams that give the same answers, to fail over to."
    )

    @model_validator(mode="before")
    @classmethod
    def _derive_kind(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        table = cast("Mapping[str, Any]", data)
        if table.get("kind") is not None:
            return table
        apart = table.get("options")
        keys = {*table, *(cast("Mapping[str, Any]", apart) if isinstance(apart, Mapping) else ())}
        kind = "openai" if "base_url" in keys else "litellm" if "model" in keys and "path" not in keys else "embedded"
        return {**table, "kind": kind}

    @property
    def plugin_options(self) -> dict[str, Any]:
        """What the plug-in is made with: the options, and the key if there is one."""
        return self.options if self.api_key is None else {**self.options, "api_key": self.api_key}


class ToolSettings(_WithOptions):
    """A tool that programs reach by its name: a corpus that they search, say."""

    kind: str = Field(
        default="corpus",
        min_length=1,
        description="The plug-in: `corpus`, another that is installed, or `module:attribute`.",
    )


class RunLimits(_Table):
    """Upper bounds of one run; without a value there is no bound. A request may tighten them, never widen them."""

    calls: Whole | None = Field(default=None, ge=1, description="Calls to upstreams that one run may make.")
    tokens: Whole | None = Field(default=None, ge=1, description="Tokens, prompt and generated, that one run may use.")
    cost: Number | None = Field(default=None, gt=0, description="US dollars that one run may spend.")
    seconds: Number | None = Field(default=None, gt=0, description="Seconds that one run may take.")

    @property
    def run(self) -> Limits:
        return Limits(calls=self.calls, tokens=self.tokens, cost=self.cost, seconds=self.seconds)


class LimitsSettings(RunLimits):
    """Bounds of every run, and of what a request may hold."""

    body_bytes: Whole = Field(default=20_000_000, ge=1, description="Bytes of a request's body.")
    messages: Whole = Field(default=2048, ge=1, description="Messages in a request.")
    n: Whole = Field(default=16, ge=1, description="The highest `n`: how often one request may run a program.")
    in_flight: Whole = Field(
        default=2_000,
        ge=1,
        description="Requests that one process answers at a time; what is more is refused with 503, to come again.",
    )
    in_flight_bytes: Whole = Field(
        default=268_435_456,
        ge=1,
        description="Bytes of the bodies of those requests together, and of the kept responses that they go on from. "
        "In memory a body takes about three times its size.",
    )


Repeats: TypeAlias = Literal["same", "another"]
REPEATS = (
    "What a request gets whose answer was delivered whole before: the `same` answer, from the cache, or `another`, "
    "with new draws, as chat front ends mean it. An SDK's own retry always gets the same."
)


class ProgramSettings(_Table):
    """What the operator sets for one program; a preset and a request come after it."""

    roles: dict[str, UpstreamName] = Field(default={}, description="Which model plays which role of the program.")
    limits: RunLimits = Field(default=RunLimits(), description="Bounds of its runs, besides those of every run.")
    params: dict[str, Any] = Field(default={}, description="Defaults of its parameters.")
    repeats: Repeats | None = Field(
        default=None,
        description=REPEATS,
        json_schema_extra={"default_words": "`[cache] repeats`"},
    )


class Preset(_Table):
    """A program with parameters and roles under a name of its own, for clients that can only type a name."""

    program: UpstreamName = Field(description="The program's name, or a composition `PROGRAM:REST`.")
    params: dict[str, Any] = Field(default={}, description="Parameters of the program.")
    roles: dict[str, UpstreamName] = Field(default={}, description="Which model plays which role of the program.")
    description: str = Field(default="", description="What `/v1/models` says about it.")
    repeats: Repeats | None = Field(
        default=None,
        description=REPEATS,
        json_schema_extra={"default_words": "its program's"},
    )


class CacheSettings(_WithOptions):
    """Where the answers of steps are kept."""

    kind: str = Field(
        default="disk",
        min_length=1,
        description="`disk`, `memory`, `off`, another plug-in that is installed, or `module:attribute`.",
    )
    programs: bool = Field(default=True, description="Whether the steps of programs are cached.")
    upstreams: bool = Field(default=False, description="Whether calls that are passed through are cached.")
    repeats: Repeats = Field(default="same", description=REPEATS)
    another_for: list[str] = Field(
        default=[], description="Holders of keys whose repeats get `another` answer, whatever else is set."
    )


class IdempotencySettings(_Table):
    """Requests that their client names, by the header `Idempotency-Key`: those with one name are one run."""

    grace_seconds: Number = Field(
        default=60, ge=0, description="Seconds that such a run goes on after its client has left."
    )
    keep_seconds: Number = Field(default=600, ge=0, description="Seconds that its answer is kept for a repeat.")


class TraceSettings(_Table):
    """The traces that are kept on this machine; OpenTelemetry itself is set by its own `OTEL_*` variables."""

    local: bool = Field(default=True, description="Whether the last runs are kept for `asmodel trace`.")
    path: Folder | None = Field(
        default=None,
        description="The file that they are kept in.",
        json_schema_extra={"default_words": "`asmodel/traces.sqlite` in `$XDG_STATE_HOME`, or in `~/.local/state`"},
    )
    redact: str | None = Field(
        default=None,
        description="What is applied to each text before it is recorded, where content is: `module:attribute` of a "
        "function `(kind, text) -> text`, or an installed plug-in of the kind `redactors`.",
    )
    content_bytes: Whole = Field(
        default=30_000, ge=1_000, description="Bytes of recorded content in one attribute of a span; more is cut."
    )
    hosts: list[str] = Field(
        default=[],
        description="Upstreams that are told the trace, as `traceparent`: `host`, `host:port` or `*.suffix`.",
    )
    force: list[str] = Field(
        default=[],
        description="Holders of keys who may have a request traced whatever the sampler says (`x-asmodel-trace: on`). "
        "Without `[keys]`, whoever is answered may.",
    )
    jaeger: PageAddress | None = Field(
        default=None,
        description="Where Jaeger's page is, such as `http://127.0.0.1:16686`; the front page links each run to it.",
    )


class RecordingSettings(_Table):
    """What runs were asked and answered, kept on this machine so that they can be replayed."""

    on: bool | None = Field(
        default=None,
        description="Whether every run of a program is recorded, for `asmodel replay`.",
        json_schema_extra={"default_words": "`true` where the content of traces is captured, else `false`"},
    )
    path: Folder | None = Field(
        default=None,
        description="The folder that they are kept in, a file each.",
        json_schema_extra={"default_words": "`asmodel/recordings` in `$XDG_STATE_HOME`, or in `~/.local/state`"},
    )
    runs: Whole = Field(default=1000, ge=1, description="How many are kept; the oldest go first.")
    bytes: Whole = Field(
        default=268_435_456,
        ge=100_000,
        description="Bytes that they may take together; the oldest go first, and a single one ends there.",
    )


class StoreSettings(_Table):
    """Responses that are kept, so that `previous_response_id` can go on from them. They are no part of the cache."""

    kind: Literal["disk", "off"] = Field(
        default="disk", description="`disk`, or `off`: nothing is kept, as by `store: false` of a request."
    )
    path: Folder | None = Field(
        default=None,
        description="The folder that they are kept in.",
        json_schema_extra={"default_words": "`asmodel/responses` in `$XDG_STATE_HOME`, or in `~/.local/state`"},
    )
    days: Number = Field(default=7, gt=0, description="Days that one is kept after it was made, or last gone on from.")
    bytes: Whole = Field(
        default=1_073_741_824,
        ge=100_000,
        description="Bytes that they may take together; those that were not gone on from for longest go first.",
    )


class LogSettings(_Table):
    """How the log looks."""

    format: Literal["console", "json"] = Field(
        default="console", description="`console`, for people, or `json`: one object a line."
    )


class MetricsSettings(_Table):
    """Who may read `/metrics`. Whoever may ask for answers may; without keys, this machine."""

    key: SecretStr | None = Field(
        default=None, description="A key that reads the metrics and nothing else; `env:NAME` takes it from there."
    )
    open: bool = Field(default=False, description="Whether the metrics can be read by anyone, without a key.")


class Settings(BaseSettings):
    """All settings, frozen. Made by `load`, or by hand from what is given and the defaults alone."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field(default="127.0.0.1", min_length=1, description="The address to listen at.")
    port: Whole = Field(default=8000, ge=0, le=65535, description="The port to listen at; 0 takes a free one.")
    workers: Whole = Field(default=1, ge=1, description="Processes that answer requests.")
    program_folders: list[Folder] = Field(
        default=[], description="Folders of program files, each `.py` in them a module (flag `--programs`, repeatable)."
    )
    upstreams: dict[UpstreamName, UpstreamSettings] = Field(
        default={},
        description="The models that calls go to, by name.",
        json_schema_extra={"default_words": "`default`, the embedded model"},
    )
    keys: dict[str, SecretStr] = Field(
        default={},
        description="Keys that clients must show one of, by the name of whoever holds it; `env:NAME` takes a key from "
        "the environment. Each holder has a cache of its own. Without keys only this machine is answered.",
    )
    roles: dict[str, UpstreamName] = Field(default={}, description="Which model plays which role, in every program.")
    programs: dict[Name, ProgramSettings] = Field(default={}, description="What is set for single programs, by name.")
    models: dict[Name, Preset] = Field(default={}, description="Presets, by name.")
    tools: dict[Name, ToolSettings] = Field(default={}, description="Tools that programs reach by their names.")
    cache: CacheSettings = Field(default=CacheSettings(), description="Where the answers of steps are kept.")
    limits: LimitsSettings = Field(default=LimitsSettings(), description="Bounds of every run and of every request.")
    traces: TraceSettings = Field(default=TraceSettings(), description="The traces that are kept on this machine.")
    recording: RecordingSettings = Field(
        default=RecordingSettings(),
        description="What runs were asked and answered, kept so that they can be replayed.",
    )
    store: StoreSettings = Field(
        default=StoreSettings(), description="Responses that are kept, so that clients can go on from them."
    )
    log: LogSettings = Field(default=LogSettings(), description="How the log looks.")
    metrics: MetricsSettings = Field(default=MetricsSettings(), description="Who may read `/metrics`.")
    idempotency: IdempotencySettings = Field(
        default=IdempotencySettings(), description="Requests that their client names, by the header `Idempotency-Key`."
    )
    drain_seconds: Number = Field(
        default=30, ge=0, description="Seconds that requests may take to end when the server is told to stop."
    )
    progress: bool = Field(
        default=True, description="Whether a program's stream says, as reasoning text, which step it is at."
    )
    front_page: bool = Field(
        default=True, description="Whether there is a page at `/`: what is served, a form to try it, the last runs."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The library's own sources skip variables that name no setting, and forget where a value was written. `load`
        # reads the sources with asmodel.sources, which does neither.
        return (init_settings,)

    @model_validator(mode="after")
    def _equals_are_upstreams(self) -> Settings:
        wrong: list[tuple[tuple[str, ...], str]] = []
        for name, upstream in self.upstreams.items():
            others = [other for other in self.upstreams if other != name]
            for equal in upstream.equals:
                if equal == name:
                    wrong.append((("upstreams", name, "equals"), "names the upstream itself; name others"))
                elif equal not in self.upstreams:
                    near = did_you_mean(equal, others) or f"; the others are {listed(others)}"
                    wrong.append((("upstreams", name, "equals"), f'there is no upstream "{equal}"{near}'))
        if wrong:
            raise Mistakes(wrong)
        return self

    @property
    def embedded_by_default(self) -> bool:
        """Whether the embedded model answers because no upstream is set."""
        return not self.upstreams

    def repeats(self, model: str, holder: str) -> bool:
        """Whether a repeat of a request for that model gets another answer; `holder` is whose key came with it."""
        preset = self.models.get(model)
        program = (model if preset is None else preset.program).partition(":")[0]
        set_for = self.programs.get(program)
        said = (preset and preset.repeats) or (set_for and set_for.repeats) or self.cache.repeats
        return said == "another" or holder in self.cache.another_for

    @property
    def effective_upstreams(self) -> dict[str, UpstreamSettings]:
        """The upstreams that are set, or else the embedded model as `default`."""
        return self.upstreams or {"default": UpstreamSettings(kind="embedded")}


def load(
    config: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Read the settings: defaults, then the file, then the environment, then the flags; the later one wins.

    The file is `config`, else what `ASMODEL_CONFIG` names, else `asmodel.toml` in the current folder if there is one.
    `flags` are settings by their names, nested as they are. Without `environ`, the process's own environment is read.

    Raises ConfigurationError with a line for every mistake.
    """
    variables = os.environ if environ is None else environ
    named = config
    if named is None and variables.get("ASMODEL_CONFIG"):
        named = Path(variables["ASMODEL_CONFIG"])
    file = named if named is not None else Path(FILE)
    if named is not None and not named.expanduser().exists():
        source = "--config" if config is not None else "ASMODEL_CONFIG"
        raise ConfigurationError(f"{source}: there is no file {named}")
    layer = read_flags(flags or {})
    if named is not None or file.exists():
        written = read_toml(file.expanduser())
        layer = layer.over(read_environment(variables, Settings, written.values).over(written))
    else:
        layer = layer.over(read_environment(variables, Settings, {}))
    resolve_environment_references(layer, variables, ("upstreams", "cache", "keys", "metrics"))
    _add_places(layer.values, variables)
    # BaseSettings takes instructions to itself under names that start so, and no setting does.
    for name in [name for name in layer.values if name.startswith("_")]:
        del layer.values[name]
        near = did_you_mean(name, Settings.model_fields)
        layer.mistakes.append(f"{layer.place((name,))}: {name}: there is no such setting{near}")
    try:
        settings = Settings(**layer.values)
    except ValidationError as error:
        layer.mistakes.extend(explained(error, layer, Settings))
        raise ConfigurationError("\n".join(layer.mistakes)) from None
    if layer.mistakes:
        raise ConfigurationError("\n".join(layer.mistakes))
    return settings


def _add_places(values: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Where the disk cache and the traces are by default: by the XDG base directory specification, version 0.8."""

    def base(variable: str, otherwise: str) -> Path:
        # The specification wants a path that is not absolute to be ignored.
        given = Path(environ.get(variable, ""))
        return given if given.is_absolute() else Path(otherwise).expanduser()

    cache = values.setdefault("cache", {})
    if isinstance(cache, dict) and cast("dict[str, Any]", cache).get("kind", "disk") == "disk":
        values["cache"] = {"path": str(base("XDG_CACHE_HOME", "~/.cache") / "asmodel"), **cast("dict[str, Any]", cache)}
    traces = values.setdefault("traces", {})
    if isinstance(traces, dict):
        path = base("XDG_STATE_HOME", "~/.local/state") / "asmodel" / "traces.sqlite"
        values["traces"] = {"path": path, **cast("dict[str, Any]", traces)}
    recording = values.setdefault("recording", {})
    if isinstance(recording, dict):
        path = base("XDG_STATE_HOME", "~/.local/state") / "asmodel" / "recordings"
        values["recording"] = {"path": path, **cast("dict[str, Any]", recording)}
    store = values.setdefault("store", {})
    if isinstance(store, dict):
        path = base("XDG_STATE_HOME", "~/.local/state") / "asmodel" / "responses"
        values["store"] = {"path": path, **cast("dict[str, Any]", store)}


@dataclass(frozen=True, slots=True)
class Row:
    """One setting as a page shows it. In `name`, NAME stands for a name that the operator gives."""

    name: str
    type: str
    default: str
    doc: str


def describe() -> list[Row]:
    """Every setting, in the order in which it is declared."""
    return list(_rows(Settings, ""))


def settings_markdown() -> str:
    """The table of all settings, and that of the variables that are none, in Markdown."""
    lines = ["| setting | value | default | what it is for |", "|---|---|---|---|"]
    lines += [f"| `{row.name}` | {row.type} | {row.default} | {row.doc} |" for row in describe()]
    lines += ["", "| variable that is no setting | what it is for |", "|---|---|"]
    lines += [f"| `{name}` | {doc} |" for name, doc in INTERNAL.items()]
    return "\n".join(lines) + "\n"


def _rows(model: type[BaseModel], prefix: str) -> Iterator[Row]:
    # What a class inherits comes last: `options` is "every other key", and reads so only at the end.
    for name in sorted(model.model_fields, key=lambda name: name == "options"):
        field = model.model_fields[name]
        annotation = _without_none(field.annotation)
        yield Row(prefix + name, _type_words(annotation), _default_words(field), field.description or "")
        if get_origin(annotation) is dict:
            inside, below = get_args(annotation)[1], f"{prefix}{name}.NAME."
        else:
            inside, below = annotation, f"{prefix}{name}."
        if isinstance(inside, type) and issubclass(inside, BaseModel):
            yield from _rows(inside, below)


def _without_none(annotation: Any) -> Any:
    members = [member for member in get_args(annotation) if member is not type(None)]
    return members[0] if len(members) == 1 and type(None) in get_args(annotation) else annotation


_WORDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    SecretStr: "text",
    Path: "path",
    Any: "value",
}


def _type_words(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_type_words(get_args(annotation)[0])}s"
    if get_origin(annotation) is dict:
        inside = _type_words(get_args(annotation)[1])
        return f"table of {inside}" if inside == "text" else f"table of {inside}s"
    return _WORDS.get(annotation, "table")


def _default_words(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    words = cast("dict[str, object]", extra).get("default_words") if isinstance(extra, dict) else None
    if isinstance(words, str):
        return words
    if field.is_required():
        return "required"
    value: object = field.default
    if value is None or value == "" or isinstance(value, BaseModel) or value in ([], {}):
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
