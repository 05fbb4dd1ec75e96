"""What is said about the chart is in it, and the image installs what the lock file says; nothing here needs Helm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helm import describe
from helm.lock import picked

ROOT = Path(__file__).resolve().parent.parent
HELM = ROOT / "helm"
CHART = HELM / "asmodel"
LOCK, PROJECT = (ROOT / "requirements.lock").read_text(), (ROOT / "pyproject.toml").read_text()


def test_what_is_made_from_the_values_is_up_to_date() -> None:
    stale = [str(file.relative_to(ROOT)) for file, text in describe.made().items() if file.read_text() != text]
    assert not stale, f"make chart: {stale}"


def test_every_value_is_on_the_page_and_says_what_it_is_for() -> None:
    page = (HELM / "README.md").read_text()

    def look(values: list[describe.Value], before: str) -> None:
        for value in values:
            if value.inside:
                look(value.inside, f"{before}{value.name}.")
            else:
                assert f"| `{before}{value.name}` |" in page

    values = describe.read((CHART / "values.yaml").read_text())
    look(values, "")
    undocumented = [value.name for value in values if not value.doc and value.inside == [] and value.default in ("", 0)]
    # What Kubernetes or Helm's own guide names so needs no words.
    assert set(undocumented) <= {"nameOverride", "fullnameOverride", "priorityClassName"}


@pytest.mark.parametrize(
    "file", sorted([*HELM.glob("examples/*.yaml"), *CHART.glob("ci/*.yaml")]), ids=lambda f: f.stem
)
def test_values_files_fit_the_schema(file: Path) -> None:
    validator: Any = jsonschema.Draft7Validator(json.loads((CHART / "values.schema.json").read_text()))
    errors = [error.message for error in validator.iter_errors(yaml.safe_load(file.read_text()))]
    assert errors == []


def test_there_is_a_values_file_for_a_laptop_a_team_and_a_fleet() -> None:
    assert {file.stem for file in HELM.glob("examples/*.yaml")} == {"laptop", "team", "fleet"}


def test_the_chart_is_of_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert re.search(rf'^version = "{re.escape(chart["appVersion"])}"$', PROJECT, re.MULTILINE)


def names(lock: str) -> set[str]:
    return set(re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE))


def test_an_image_has_what_is_needed_and_nothing_else() -> None:
    whole = names(picked(LOCK, PROJECT, extras=["redis"]))
    assert {"litellm", "openai", "tokenizers", "xllamacpp", "redis", "starlette"} <= whole
    assert not whole & {"hatchling", "pytest"}
    small = names(picked(LOCK, PROJECT, extras=["redis"], without=["litellm", "xllamacpp"]))
    assert {"redis", "starlette", "aiohttp"} <= small
    # What only litellm needs goes with it.
    assert not small & {"litellm", "openai", "tokenizers", "boto3", "botocore", "tiktoken", "xllamacpp"}
    assert names(picked(LOCK, PROJECT, group="build")) >= {"hatchling", "editables", "packaging"}


def test_what_an_image_installs_has_the_hashes_of_the_lock_file() -> None:
    for block in re.split(r"\n(?=[a-z0-9])", picked(LOCK, PROJECT)):
        assert "--hash=sha256:" in block
        assert block.strip() in LOCK


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="litelm"):
        picked(LOCK, PROJECT, without=["litelm"])
