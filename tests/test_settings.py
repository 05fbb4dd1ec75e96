"""Where settings come from, which of them wins, and what is said about one that is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from asmodel.budget import Limits
from asmodel.errors import ConfigurationError
from asmodel.settings import Settings, UpstreamSettings, describe, load, settings_markdown

DOCS = Path(__file__).resolve().parent.parent / "docs" / "settings.md"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)


def toml(text: str, name: str = "asmodel.toml") -> Path:
    file = Path(name)
    file.write_text(text, encoding="utf-8")
    return file


def mistakes(
    config: Path | None = None, flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(config, flags, environ or {})
    return str(caught.value).splitlines()


# Which source wins


def test_without_a_word_the_defaults_hold() -> None:
    settings = load(environ={})
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8000, 1)
    assert settings.limits.body_bytes == 20_000_000
    assert settings.limits.run == Limits()
    assert settings.drain_seconds == 30


def test_the_file_is_over_the_defaults_the_environment_over_the_file_and_a_flag_over_all() -> None:
    toml('host = "::1"\nport = 1\nworkers = 2\n')
    settings = load(flags={"workers": 4}, environ={"ASMODEL_PORT": "3", "ASMODEL_WORKERS": "3"})
    assert (settings.host, settings.port, settings.workers) == ("::1", 3, 4)


def test_tables_are_merged_key_by_key() -> None:
    toml('[upstreams.fast]\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "m"\nretries = 1\n')
    settings = load(environ={"ASMODEL_UPSTREAMS__FAST__RETRIES": "5", "ASMODEL_UPSTREAMS__FAST__MODEL": "other"})
    fast = settings.upstreams["fast"]
    assert fast.retries == 5
    assert fast.options == {"base_url": "http://127.0.0.1:1/v1", "model": "other"}


def test_a_flag_that_was_not_given_says_nothing() -> None:
    toml('port = 1\nprogram_folders = ["a"]\n')
    settings = load(flags={"port": None, "program_folders": ()}, environ={})
    assert (settings.port, settings.program_folders) == (1, [Path("a")])


def test_a_named_file_is_read_instead_of_the_one_in_the_folder() -> None:
    toml("port = 1\n")
    other = toml("workers = 2\n", "other.toml")
    assert load(other, environ={}).port == 8000
    assert load(environ={"ASMODEL_CONFIG": "other.toml"}).workers == 2


def test_a_named_file_that_is_missing_is_an_error() -> None:
    assert mistakes(Path("gone.toml")) == ["--config: there is no file gone.toml"]
    assert mistakes(environ={"ASMODEL_CONFIG": "gone.toml"}) == ["ASMODEL_CONFIG: there is no file gone.toml"]


def test_settings_made_by_hand_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASMODEL_PORT", "1")
    monkeypatch.setenv("PORT", "2")
    toml("port = 3\n")
    assert Settings().port == 8000


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


# The environment


def test_variables_reach_names_that_no_variable_can_spell() -> None:
    toml('[upstreams."llama3.2:3b"]\nmodel = "x"\n[models.very-careful]\nprogram = "p"\n')
    settings = load(
        environ={
            "ASMODEL_UPSTREAMS__LLAMA3_2_3B__RETRIES": "0",
            "ASMODEL_MODELS__VERY_CAREFUL__DESCRIPTION": "slow",
            "ASMODEL_PROGRAMS__EVIDENCE_QA__LIMITS__CALLS": "9",
        }
    )
    assert settings.upstreams["llama3.2:3b"].retries == 0
    assert settings.models["very-careful"].description == "slow"
    assert settings.programs["evidence-qa"].limits.calls == 9


def test_a_variable_may_hold_a_table_as_json_and_another_one_a_key_of_it() -> None:
    settings = load(
        environ={
            "ASMODEL_UPSTREAMS": '{"My-Model": {"model": "a/b", "retries": 1}}',
            "ASMODEL_UPSTREAMS__MY_MODEL__MODEL": "c/d",
        }
    )
    # The name is not known from a file, so the second variable names another upstream, in lower case.
    assert settings.upstreams["My-Model"].options == {"model": "a/b"}
    assert settings.upstreams["my_model"].options == {"model": "c/d"}


def test_lists_in_variables_are_json_or_have_separators() -> None:
    upstreams = {"ASMODEL_UPSTREAMS__A__MODEL": "a", "ASMODEL_UPSTREAMS__B__MODEL": "b"}
    settings = load(
        environ={**upstreams, "ASMODEL_UPSTREAMS__A__EQUALS": "b", "ASMODEL_PROGRAM_FOLDERS": '["x", "y, z"]'}
    )
    assert settings.upstreams["a"].equals == ["b"]
    assert settings.program_folders == [Path("x"), Path("y, z")]


def test_text_that_looks_like_json_stays_text_where_text_is_wanted() -> None:
    environ = {"ASMODEL_UPSTREAMS__A__API_KEY": "{not json", "ASMODEL_MODELS__M__PROGRAM": "[p]"}
    settings = load(environ=environ)
    key = settings.upstreams["a"].api_key
    assert key is not None
    assert key.get_secret_value() == "{not json"
    assert settings.models["m"].program == "[p]"


def test_what_starts_like_json_and_is_none_is_an_error() -> None:
    assert mistakes(environ={"ASMODEL_UPSTREAMS": "{broken"}) == ["ASMODEL_UPSTREAMS: starts like JSON and is not JSON"]


def test_internal_variables_are_no_settings() -> None:
    environ = {
        "ASMODEL_EMBEDDED_ADDRESS": "x",
        "ASMODEL_EMBEDDED_KEY": "y",
        "ASMODEL_TEST_X": "z",
        "ASMODEL_SOAK_MINUTES": "1",
        "ASMODEL_BENCH_CACHE": "z",
        "ASMODEL_E2E_Y": "z",
    }
    assert load(environ=environ) == load(environ={})


# Mistakes


def test_every_mistake_is_told_in_one_go_with_where_it_was_written() -> None:
    toml('prot = 1\n\n[upstreams.fast]\nmodel = "m"\nconcurrency = "many"\n')
    assert sorted(mistakes(flags={"port": 70000}, environ={"ASMODEL_WORKERS": "two"})) == [
        "--port: must be at most 65535, got 70000",
        'ASMODEL_WORKERS: a whole number is expected, got "two"',
        'asmodel.toml line 1: prot: there is no such setting (did you mean "port"?)',
        'asmodel.toml line 5: upstreams.fast.concurrency: a whole number is expected, got "many"',
    ]


def test_an_unknown_variable_is_an_error() -> None:
    assert mistakes(environ={"ASMODEL_CACHE__PROGRAM": "on", "ASMODEL_LIMITS__CALL": "1"}) == [
        'ASMODEL_LIMITS__CALL: there is no such setting (did you mean "calls"?)'
    ]


def test_an_unknown_name_without_a_near_one_is_answered_with_those_there_are() -> None:
    toml("[traces]\nxyz = 1\n")
    known = "content_bytes, force, hosts, jaeger, local, path, redact"
    assert mistakes() == [f"asmodel.toml line 2: traces.xyz: there is no such setting; known here are {known}"]


def test_a_name_that_pydantic_settings_would_obey_is_an_unknown_setting_too() -> None:
    toml('_env_file = "x"\n')
    (env, file) = sorted(mistakes(environ={"ASMODEL__PORT": "1"}))
    assert env == 'ASMODEL__PORT: _port: there is no such setting (did you mean "port"?)'
    assert file.startswith("asmodel.toml line 1: _env_file: there is no such setting")


def test_variables_that_kubernetes_makes_of_a_service_are_explained() -> None:
    (line,) = mistakes(environ={"ASMODEL_PORT": "tcp://10.0.0.1:8000"})
    assert line.startswith('ASMODEL_PORT: a whole number is expected, got "tcp://10.0.0.1:8000"; if Kubernetes')
    assert "enableServiceLinks: false" in line
    (line,) = mistakes(environ={"ASMODEL_SERVICE_HOST": "10.0.0.1"})
    assert "enableServiceLinks: false" in line


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [("port = 1\nhost = x\n", 2, 8), ('[cache\nkind = "off"\n', 1, 7), ('host = "', 1, 9)],
)
def test_a_file_that_is_not_toml_is_answered_with_line_and_column(text: str, line: int, column: int) -> None:
    toml(text)
    (told,) = mistakes()
    assert told.startswith(f"asmodel.toml line {line}, column {column}: is not TOML: ")


def test_a_file_that_is_not_utf_8_is_answered_with_its_line() -> None:
    Path("asmodel.toml").write_bytes(b'port = 1\nhost = "\xff"\n')
    assert mistakes() == ["asmodel.toml line 2: is not UTF-8, as TOML must be"]


def test_a_folder_is_no_settings_file() -> None:
    Path("folder").mkdir()
    assert mistakes(Path("folder")) == ["folder: cannot be read: Is a directory"]


def test_the_line_is_found_behind_values_of_many_lines() -> None:
    toml(
        'program_folders = [\n  "a",\n  "port = 1",\n]\n\n'
        '[models.m]\nprogram = "p"\ndescription = """\n[cache]\nport = 2"""\nprams = {}\n'
    )
    (line,) = mistakes()
    assert line == 'asmodel.toml line 11: models.m.prams: there is no such setting (did you mean "params"?)'


def test_a_table_written_as_a_value_is_answered_with_what_is_in_it() -> None:
    (line,) = mistakes(environ={"ASMODEL_TRACES": "off"})
    inside = "content_bytes, force, hosts, jaeger, local, path, redact"
    assert line == f'ASMODEL_TRACES: a table is expected, got "off", with {inside} in it'


def test_a_truth_is_no_number() -> None:
    toml("workers = true\n")
    assert mistakes() == ["asmodel.toml line 1: workers: a whole number is expected, got true"]


def test_what_is_missing_is_named_with_what_it_is() -> None:
    toml("[models.careful]\nparams = { samples = 9 }\n")
    assert mistakes() == [
        "asmodel.toml line 1: models.careful.program: is missing: The program's name, or a composition `PROGRAM:REST`."
    ]


@pytest.mark.parametrize("table", ['[models."Very Careful"]\nprogram = "p"', "[programs.evidence_qa]"])
def test_programs_and_presets_have_names_of_small_letters_digits_and_hyphens(table: str) -> None:
    toml(table)
    (line,) = mistakes()
    assert line.endswith(": a name is made of a-z, 0-9 and -")


@pytest.mark.parametrize("name", ['""', '"a b"', r'"a\u0007"', r'"a\n"'])
def test_an_upstream_has_a_name_that_can_be_seen(name: str) -> None:
    toml(f"[upstreams.{name}]\n")
    (line,) = mistakes()
    assert line.endswith(": a name is not empty, and has no spaces or control characters in it")


def test_an_upstream_may_be_called_as_its_model_is() -> None:
    toml('[upstreams."llama3.2:3b"]\nmodel = "x"\n[upstreams."meta/Llama_3"]\nmodel = "y"\n')
    assert list(load(environ={}).upstreams) == ["llama3.2:3b", "meta/Llama_3"]


def test_equals_must_name_other_upstreams() -> None:
    toml('[upstreams.one]\nequals = ["two"]\n[upstreams.tow]\nequals = ["tow"]\n')
    assert mistakes() == [
        'asmodel.toml line 2: upstreams.one.equals: there is no upstream "two" (did you mean "tow"?)',
        "asmodel.toml line 4: upstreams.tow.equals: names the upstream itself; name others",
    ]


def test_no_message_speaks_of_pydantic() -> None:
    toml(
        'host = 1\nprogress = "perhaps"\nroles = 3\n[models]\nx = 1\n'
        '[upstreams.a]\nprice = { input = -1, output = "x" }\n'
    )
    told = "\n".join(mistakes(environ={"ASMODEL_DRAIN_SECONDS": "inf"}))
    assert "pydantic" not in told.lower()
    assert "http" not in told
    assert "validat" not in told
    assert len(told.splitlines()) == 7


# Upstreams and caches


@pytest.mark.parametrize(
    ("table", "kind"),
    [
        ({"base_url": "http://x/v1", "model": "m"}, "openai"),
        ({"model": "openai/gpt"}, "litellm"),
        ({"path": "model.gguf", "model": "m"}, "embedded"),
        ({}, "embedded"),
        ({"kind": "mine:Upstream", "model": "m"}, "mine:Upstream"),
        ({"options": {"base_url": "http://x/v1"}}, "openai"),
    ],
)
def test_the_kind_of_an_upstream_follows_from_what_is_set(table: dict[str, Any], kind: str) -> None:
    assert UpstreamSettings.model_validate(table).kind == kind


def test_keys_that_asmodel_has_no_use_for_go_to_the_plug_in() -> None:
    toml('[upstreams.a]\nmodel = "m"\ntimeout = 5\nseed = 1\n[upstreams.a.options]\ntimeout = 9\n')
    upstream = load(environ={}).upstreams["a"]
    assert upstream.timeout == 5
    assert upstream.plugin_options == {"model": "m", "seed": 1, "timeout": 9}


def test_an_option_written_twice_is_an_error() -> None:
    toml('[upstreams.a]\nmodel = "m"\noptions = { model = "n" }\n')
    assert mistakes() == ['asmodel.toml line 2: upstreams.a.model: stands both here and in "options.model"; keep one']


def test_without_an_upstream_the_embedded_model_is_the_default() -> None:
    settings = load(environ={})
    assert settings.embedded_by_default
    assert settings.effective_upstreams == {"default": UpstreamSettings(kind="embedded")}
    named = load(environ={"ASMODEL_UPSTREAMS__DEFAULT__KIND": "embedded"})
    assert not named.embedded_by_default
    assert named.effective_upstreams == settings.effective_upstreams


def test_the_disk_cache_and_the_traces_are_where_xdg_says(tmp_path: Path) -> None:
    environ = {"XDG_CACHE_HOME": str(tmp_path / "c"), "XDG_STATE_HOME": str(tmp_path / "s")}
    settings = load(environ=environ)
    assert settings.cache.options == {"path": str(tmp_path / "c" / "asmodel")}
    assert settings.traces.path == tmp_path / "s" / "asmodel" / "traces.sqlite"
    settings = load(environ={"XDG_CACHE_HOME": "not/absolute"})
    assert settings.cache.options == {"path": str(Path.home() / ".cache" / "asmodel")}


def test_another_cache_is_not_given_the_path_of_the_disk_cache() -> None:
    assert load(environ={"ASMODEL_CACHE__KIND": "memory"}).cache.options == {}


def test_a_tilde_is_the_home_folder() -> None:
    toml('program_folders = ["~/p"]\n[cache]\npath = "~/c"\n[traces]\npath = "~/t"\n')
    settings = load(environ={})
    assert settings.program_folders == [Path.home() / "p"]
    assert settings.cache.options["path"] == str(Path.home() / "c")
    assert settings.traces.path == Path.home() / "t"


# Keys


def test_a_key_is_taken_from_the_variable_that_the_setting_names() -> None:
    toml('[upstreams.a]\nmodel = "m"\napi_key = "env:MY_KEY"\n[upstreams.a.headers]\nx-tenant = "env:TENANT"\n')
    options = load(environ={"MY_KEY": "s3cret", "TENANT": "t"}).upstreams["a"].plugin_options
    assert options["api_key"].get_secret_value() == "s3cret"
    assert options["headers"]["x-tenant"].get_secret_value() == "t"


@pytest.mark.parametrize(("environ", "state"), [({}, "is not set"), ({"MY_KEY": ""}, "is empty")])
def test_a_variable_that_holds_no_key_is_named_with_its_setting(environ: dict[str, str], state: str) -> None:
    toml('[upstreams.a]\nmodel = "m"\napi_key = "env:MY_KEY"\n')
    assert mistakes(environ=environ) == [
        f"asmodel.toml line 3: upstreams.a.api_key: the environment variable MY_KEY {state}; "
        "set it, or name another one with env:NAME"
    ]


def test_a_key_is_in_no_repr_no_dump_and_no_error() -> None:
    toml(
        '[upstreams.a]\nmodel = "m"\napi_key = "s3cret"\nheaders = { Authorization = "Bearer s3cret", x = 1 }\n'
        'aws_secret_access_key = "s3cret"\nproxy = "http://me:s3cret@proxy"\n'
        '[cache]\nkind = "redis"\nurl = "redis://:s3cret@cache"\npassword = "s3cret"\n'
    )
    settings = load(environ={"ASMODEL_UPSTREAMS__B__API_KEY": "s3cret"})
    assert "s3cret" not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()
    assert settings.upstreams["a"].options["headers"]["x"] == 1
    toml('[upstreams.a]\napi_key = ["s3cret"]\ntimeout = "http://me:s3cret@proxy"\nretries = { token = "s3cret" }\n')
    told = "\n".join(mistakes())
    assert "api_key" in told
    assert "s3cret" not in told
    with pytest.raises(ValidationError) as caught:
        UpstreamSettings.model_validate({"api_key": ["s3cret"]})
    assert "s3cret" not in str(caught.value)


def test_a_key_given_by_hand_is_hidden_too() -> None:
    upstream = UpstreamSettings(api_key=SecretStr("s3cret"), options={"token": "s3cret"})
    assert "s3cret" not in repr(upstream)


# The page


def test_every_setting_is_described() -> None:
    rows = {row.name: row for row in describe()}
    assert rows["port"].default == "`8000`"
    assert rows["upstreams.NAME.price.input"].type == "number"
    assert rows["models.NAME.program"].default == "required"
    assert [row.name for row in rows.values() if not row.doc.endswith(".")] == []


def test_the_page_on_settings_has_the_table_that_the_code_makes() -> None:
    """After a change of a setting, put what `settings_markdown()` returns between the two marks of the page."""
    page = DOCS.read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- settings: from the code -->\n")
    table, end, _ = rest.partition("<!-- settings: end -->")
    assert end
    assert table == settings_markdown()


def test_the_examples_of_the_page_load() -> None:
    page = DOCS.read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in page.split("```toml\n")[1:]]
    assert blocks
    for number, block in enumerate(blocks):
        load(toml(block, f"{number}.toml"), environ={"MY_KEY": "x"})
