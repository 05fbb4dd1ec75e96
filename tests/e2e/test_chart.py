"""The chart as Helm renders it: each value has an effect, wrong ones are refused in words, the objects are valid."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from tests.e2e import jaeger
from tests.e2e.golang import BUILD_PATIENCE
from tests.e2e.kubernetes import CHART, ROOT, SERVER, VERSIONS, helm, rendered, schemas, template, tool, validated

from asmodel.settings import load

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

EXAMPLES = sorted((ROOT / "helm" / "examples").glob("*.yaml"))
CI = sorted((CHART / "ci").glob("*-values.yaml"))
MONITORS = ("monitoring.coreos.com/v1/ServiceMonitor", "monitoring.coreos.com/v1/PodMonitor")
MINIMAL: dict[str, Any] = {"settings": {"upstreams": {"default": {"model": "openai/gpt-4o-mini"}}}}

BOTH = pytest.mark.parametrize("major", [3, 4])
EVERY = pytest.mark.parametrize("file", EXAMPLES + CI, ids=lambda file: file.stem)


@pytest.mark.timeout(2 * BUILD_PATIENCE)
def test_the_tools_can_be_had() -> None:
    for name in ("helm3", "helm4", "kubeconform"):
        assert tool(name)
    for version in VERSIONS:
        assert schemas(version).is_dir()


# ---- what is valid ----


@BOTH
@EVERY
def test_helm_finds_nothing_wrong(file: Path, major: int) -> None:
    said = helm("lint", CHART, "--strict", "--values", file, "--kube-version", SERVER, major=major)
    assert said.code == 0, said.output + said.errors


@pytest.mark.parametrize("version", VERSIONS)
@EVERY
def test_what_is_rendered_is_valid_in_that_version_of_kubernetes(file: Path, version: str) -> None:
    said = template(file, version=version, apis=MONITORS)
    assert said.code == 0, said.errors
    assert validated(said.output, version) == ""


def test_what_is_not_valid_is_found() -> None:
    wrong = (
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {selector: {}, replica: 3, template: {}}\n"
    )
    assert "replica" in validated(wrong, SERVER)


@pytest.mark.timeout(2 * BUILD_PATIENCE)
@pytest.mark.parametrize(("given", "valid"), [("decision_wait", True), ("decision_waits", False)])
def test_the_collector_of_the_fleet_is_configured_rightly(tmp_path: Path, given: str, valid: bool) -> None:
    (collector,) = [
        each["data"]["config.yaml"]
        for each in rendered(ROOT / "helm" / "examples" / "fleet.yaml")
        if each["metadata"]["name"] == "asmodel-collector" and each["kind"] == "ConfigMap"
    ]
    (tmp_path / "config.yaml").write_text(collector.replace("decision_wait:", f"{given}:"))
    # Jaeger is a collector too, made of the same parts.
    command = [str(jaeger.binary()), "validate", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == valid, done.stderr


@EVERY
def test_both_majors_of_helm_render_the_same(file: Path) -> None:
    values = {"clientKeys": {"existingSecret": "one"}, "metrics": {"existingSecret": "two"}}
    three, four = (rendered(file, values=values, major=major, apis=MONITORS) for major in (3, 4))
    assert sorted(three, key=json.dumps) == sorted(four, key=json.dumps)


@EVERY
def test_the_settings_that_are_rendered_are_settings_of_the_server(file: Path, tmp_path: Path) -> None:
    objects = rendered(file)
    (tmp_path / "asmodel.toml").write_text(settings_text(objects))
    variables = {each["name"]: each.get("value", "a secret") for each in container(objects)["env"]}
    # What comes from the Secret of upstreams, which is not rendered.
    given = {"OPENAI_API_KEY": "sk-", "ANTHROPIC_API_KEY": "sk-", "MINE": "sk-"}
    secret = {name: value for name, value in variables.items() if not name.startswith("ASMODEL_")}
    settings = load(tmp_path / "asmodel.toml", environ={**given, **secret})
    assert settings.port == container(objects)["ports"][0]["containerPort"]
    assert settings.keys
    assert settings.log.format == "json"


# ---- what each value does ----


def of(objects: list[dict[str, Any]], kind: str, ending: str = "") -> dict[str, Any]:
    """The only one of that kind, of the chart itself."""
    own = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].endswith(ending)]
    own = [each for each in own if "helm.sh/chart" in each["metadata"].get("labels", {})]
    assert len(own) == 1, f"{len(own)} {kind} {ending}"
    return own[0]


def kinds(objects: list[dict[str, Any]]) -> set[str]:
    return {each["kind"] for each in objects if "helm.sh/chart" in each["metadata"].get("labels", {})}


def pod(objects: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = of(objects, "Deployment")["spec"]["template"]["spec"]
    return spec


def container(objects: list[dict[str, Any]]) -> dict[str, Any]:
    first: dict[str, Any] = pod(objects)["containers"][0]
    return first


def settings_text(objects: list[dict[str, Any]]) -> str:
    return str(of(objects, "ConfigMap", "-settings")["data"]["asmodel.toml"])


def settings(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return tomllib.loads(settings_text(objects))


def with_values(**values: Any) -> list[dict[str, Any]]:
    return rendered(values=MINIMAL | values, apis=MONITORS)


def test_a_pod_is_restricted_private_and_read_only() -> None:
    objects = with_values()
    spec, server = pod(objects), container(objects)
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {each["mountPath"] for each in server["volumeMounts"]} == {"/etc/asmodel", "/var/lib/asmodel", "/tmp"}
    assert kinds(objects) == {"ConfigMap", "Deployment", "Pod", "Secret", "Service", "ServiceAccount"}


def test_probes_ask_the_right_routes() -> None:
    server = container(with_values(probes={"liveness": {"periodSeconds": 33, "initialDelaySeconds": 3}}))
    assert {name: server[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert server["livenessProbe"]["periodSeconds"] == 33
    assert server["livenessProbe"]["initialDelaySeconds"] == 3


def test_a_pod_that_goes_has_time_for_what_it_has_begun() -> None:
    objects = with_values(shutdown={"preStopSeconds": 7, "drainSeconds": 40})
    assert container(objects)["lifecycle"]["preStop"] == {"sleep": {"seconds": 7}}
    assert settings(objects)["drain_seconds"] == 40
    assert pod(objects)["terminationGracePeriodSeconds"] == 7 + 40 + 15
    older = rendered(values=MINIMAL, version="1.29.6")
    assert container(older)["lifecycle"]["preStop"] == {"exec": {"command": ["sleep", "10"]}}
    none = with_values(shutdown={"preStopSeconds": 0, "drainSeconds": 5, "gracePeriodSeconds": 15})
    assert "lifecycle" not in container(none)
    assert pod(none)["terminationGracePeriodSeconds"] == 15


def test_settings_become_toml_with_their_types() -> None:
    given: dict[str, Any] = {
        "upstreams": {
            "default": {"model": "openai/gpt-4o-mini", "price": {"input": 0.15, "output": 1}},
            "llama3.2:3b": {"base_url": "http://o:1/v1", "model": 'a "b" \\ <c>', "retries": 0, "equals": ["default"]},
        },
        "limits": {"body_bytes": 200_000_000, "cost": 0.5},
        "models": {"careful": {"program": "self-consistency", "params": {"samples": 9, "deep": {"a": [1, {"b": 2}]}}}},
        "progress": False,
    }
    made = settings(with_values(settings=given))
    assert {name: made[name] for name in given} == given
    assert (made["host"], made["port"], made["log"]["format"]) == ("0.0.0.0", 8000, "json")
    assert isinstance(made["models"]["careful"]["params"]["samples"], int)


def test_responses_are_kept_by_one_pod_alone_and_not_where_there_are_several() -> None:
    several: dict[str, Any] = {"replicas": 2, "cache": {"kind": "disk", "perReplica": True}}
    assert "store" not in settings(with_values())
    assert settings(with_values(**several))["store"] == {"kind": "off"}
    kept = {**MINIMAL["settings"], "store": {"kind": "disk", "days": 1}}
    assert settings(with_values(**several, settings=kept))["store"] == {"kind": "disk", "days": 1}


def test_a_change_of_settings_or_programs_makes_new_pods() -> None:
    def sums(**values: Any) -> Mapping[str, str]:
        made: dict[str, str] = of(with_values(**values), "Deployment")["spec"]["template"]["metadata"]["annotations"]
        return made

    before = sums()
    assert sums() == before
    assert sums(listenAddress="::")["checksum/settings"] != before["checksum/settings"]
    one, two = (sums(programs={"files": {"a.py": text}}) for text in ("a = 1\n", "a = 2\n"))
    assert one["checksum/programs"] != two["checksum/programs"]


def test_programs_come_from_files_config_maps_a_volume_and_the_image() -> None:
    claim = {"persistentVolumeClaim": {"claimName": "programs", "readOnly": True}}
    text = "  # begins with spaces\na = 'b'\n\n\nc = 1"
    objects = with_values(
        programs={"files": {"a.py": text}, "configMaps": ["others"], "volume": claim, "imageFolder": "/baked"}
    )
    (folders,) = (each["value"] for each in container(objects)["env"] if each["name"] == "ASMODEL_PROGRAM_FOLDERS")
    assert json.loads(folders) == ["/programs/files", "/programs/others", "/programs/volume", "/baked"]
    assert of(objects, "ConfigMap", "-programs")["data"] == {"a.py": text}
    mounts = {each["mountPath"]: each for each in container(objects)["volumeMounts"]}
    volumes = {each["name"]: each for each in pod(objects)["volumes"]}
    assert all(mounts[folder]["readOnly"] for folder in json.loads(folders) if folder != "/baked")
    assert volumes[mounts["/programs/others"]["name"]]["configMap"] == {"name": "others"}
    assert volumes[mounts["/programs/volume"]["name"]] == {"name": "programs-volume", **claim}


def test_the_keys_of_clients_are_never_in_a_config_map() -> None:
    own = with_values()
    assert settings(own)["keys"] == {"default": "env:CLIENT_KEY_DEFAULT"}
    assert set(of(own, "Secret")["data"]) == {"default", "metrics"}
    named = with_values(clientKeys={"existingSecret": "mine", "holders": ["alice", "bob-2"]})
    assert settings(named)["keys"] == {"alice": "env:CLIENT_KEY_ALICE", "bob-2": "env:CLIENT_KEY_BOB_2"}
    found = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in container(named)["env"]}
    assert found["CLIENT_KEY_BOB_2"] == {"name": "mine", "key": "bob-2"}
    assert set(of(named, "Secret")["data"]) == {"metrics"}
    neither = with_values(clientKeys={"existingSecret": "mine"}, metrics={"existingSecret": "scraping"})
    assert "Secret" not in kinds(neither)


def test_metrics_have_a_key_of_their_own_or_are_open() -> None:
    objects = with_values(serviceMonitor={"enabled": True, "labels": {"release": "p"}, "interval": "7s"})
    assert settings(objects)["metrics"] == {"open": False, "key": "env:METRICS_KEY"}
    monitor = of(objects, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "asmodel-keys", "key": "metrics"}
    assert (endpoint["interval"], endpoint["path"]) == ("7s", "/metrics")
    assert monitor["metadata"]["labels"]["release"] == "p"
    bare = with_values(metrics={"open": True}, podMonitor={"enabled": True}, clientKeys={"existingSecret": "mine"})
    assert settings(bare)["metrics"] == {"open": True}
    assert "authorization" not in of(bare, "PodMonitor")["spec"]["podMetricsEndpoints"][0]
    given = with_values(metrics={"existingSecret": "s", "existingSecretKey": "k"}, podMonitor={"enabled": True})
    assert of(given, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"] == {
        "name": "s",
        "key": "k",
    }


def test_monitors_are_left_out_where_there_is_no_such_api_and_the_notes_say_so() -> None:
    values = MINIMAL | {"serviceMonitor": {"enabled": True}}
    assert "ServiceMonitor" not in kinds(rendered(values=values))


def test_the_cache_is_each_pods_own_or_shared() -> None:
    own = with_values(cache={"options": {"size_limit": 5_000_000_000}})
    assert settings(own)["cache"] == {
        "kind": "disk",
        "path": "/var/lib/asmodel/cache/asmodel",
        "size_limit": 5_000_000_000,
    }
    shared = with_values(cache={"kind": "redis", "redis": {"url": "redis://valkey:6379/0"}})
    assert settings(shared)["cache"] == {"kind": "redis", "url": "redis://valkey:6379/0"}
    secret = with_values(cache={"kind": "redis", "redis": {"existingSecret": "s", "existingSecretKey": "k"}})
    assert settings(secret)["cache"]["url"] == "env:CACHE_URL"
    found = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef") for each in container(secret)["env"]}
    assert found["CACHE_URL"] == {"name": "s", "key": "k"}
    both = {"upstreams": MINIMAL["settings"]["upstreams"], "cache": {"repeats": "another", "upstreams": True}}
    assert settings(with_values(settings=both))["cache"]["repeats"] == "another"
    assert settings(with_values(cache={"kind": "off"}, replicas=3))["cache"] == {"kind": "off"}


def test_a_volume_is_for_one_pod_that_is_stopped_before_the_next_starts() -> None:
    objects = with_values(
        persistence={"enabled": True, "size": "3Gi", "storageClass": "fast", "annotations": {"a": "b"}}
    )
    claim = of(objects, "PersistentVolumeClaim")
    assert claim["spec"]["resources"]["requests"]["storage"] == "3Gi"
    assert claim["spec"]["storageClassName"] == "fast"
    assert claim["metadata"]["annotations"] == {"a": "b"}
    assert of(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    (data,) = (each for each in pod(objects)["volumes"] if each["name"] == "data")
    assert data["persistentVolumeClaim"] == {"claimName": "asmodel"}
    theirs = with_values(persistence={"enabled": True, "existingClaim": "mine"})
    assert "PersistentVolumeClaim" not in kinds(theirs)
    without = with_values(persistence={"emptyDirSize": "9Gi"})
    (data,) = (each for each in pod(without)["volumes"] if each["name"] == "data")
    assert data["emptyDir"] == {"sizeLimit": "9Gi"}
    assert of(without, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    none = with_values(persistence={"enabled": True, "storageClass": "-"})
    assert of(none, "PersistentVolumeClaim")["spec"]["storageClassName"] == ""


def test_the_embedded_model_is_in_another_image_and_answers_by_default() -> None:
    objects = rendered(values={"embeddedModel": {"enabled": True}})
    assert container(objects)["image"] == "asmodel:0.1.0-embedded"
    assert settings(objects)["upstreams"]["default"]["kind"] == "embedded"
    beside = rendered(values={**MINIMAL, "embeddedModel": {"enabled": True}})
    assert settings(beside)["upstreams"]["default"] == {"model": "openai/gpt-4o-mini"}


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ({}, "asmodel:0.1.0"),
        ({"repository": "r.example.com/a", "tag": "2"}, "r.example.com/a:2"),
        ({"digest": "sha256:" + "1" * 64, "tag": "2"}, "asmodel@sha256:" + "1" * 64),
    ],
)
def test_the_image_is_named_by_tag_or_digest(image: dict[str, str], name: str) -> None:
    assert container(with_values(image=image))["image"] == name


def test_an_autoscaler_goes_by_cpu_and_by_what_is_in_flight() -> None:
    redis = {"kind": "redis", "redis": {"url": "redis://v:1/0"}}
    scaling = {"enabled": True, "minReplicas": 2, "maxReplicas": 6, "inFlight": {"target": 40, "metric": "m"}}
    objects = with_values(cache=redis, autoscaling={**scaling, "behavior": {"scaleDown": {"selectPolicy": "Min"}}})
    spec = of(objects, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 6)
    cpu, runs = spec["metrics"]
    assert cpu["resource"]["target"]["averageUtilization"] == 70
    assert (runs["pods"]["metric"]["name"], runs["pods"]["target"]["averageValue"]) == ("m", "40")
    assert spec["behavior"] == {"scaleDown": {"selectPolicy": "Min"}}
    # The autoscaler's number is not set back by an upgrade.
    assert "replicas" not in of(objects, "Deployment")["spec"]


def test_several_pods_are_spread_and_kept_while_machines_are_emptied() -> None:
    several = with_values(replicas=3, cache={"perReplica": True})
    assert of(several, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    (spread,) = pod(several)["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert "PodDisruptionBudget" not in kinds(with_values())


def test_network_policies_let_out_only_to_what_is_needed() -> None:
    objects = with_values(
        networkPolicy={"enabled": True, "from": [{"podSelector": {"matchLabels": {"a": "b"}}}]},
        cache={"kind": "redis", "redis": {"url": "redis://v:6380/0"}},
        telemetry={"endpoint": "http://collector:4317"},
    )
    spec = of(objects, "NetworkPolicy")["spec"]
    assert {port["port"] for rule in spec["egress"] for port in rule["ports"]} == {53, 443, 6380, 4317}
    asking = [peer["podSelector"]["matchLabels"] for peer in spec["ingress"][0]["from"]]
    assert asking == [{"asmodel-client": "true"}, {"a": "b"}]
    # The pod of `helm test` is one of those who may ask.
    assert of(objects, "Pod")["metadata"]["labels"]["asmodel-client"] == "true"


def test_telemetry_is_told_by_the_standard_variables() -> None:
    values = {"endpoint": "http://c:4318", "metrics": True, "sampleRatio": 0.25}
    found = {each["name"]: each.get("value") for each in container(with_values(telemetry=values))["env"]}
    assert found["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://c:4318"
    assert (found["OTEL_TRACES_SAMPLER"], found["OTEL_TRACES_SAMPLER_ARG"]) == ("parentbased_traceidratio", "0.25")
    assert found["OTEL_METRICS_EXPORTER"] == "otlp"
    without = {each["name"] for each in container(with_values())["env"]}
    assert not any(name.startswith("OTEL_EXPORTER") for name in without)


def test_ways_in_lead_to_the_service() -> None:
    objects = with_values(
        ingress={
            "enabled": True,
            "className": "c",
            "annotations": {"a": "b"},
            "hosts": [{"host": "h", "paths": ["/v1"]}],
        },
        httpRoute={"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["h"], "timeout": "5m"},
        service={"type": "NodePort", "nodePort": 30_000, "port": 81, "annotations": {"a": "b"}},
        containerPort=9000,
    )
    (rule,) = of(objects, "Ingress")["spec"]["rules"]
    assert rule["http"]["paths"][0]["path"] == "/v1"
    assert of(objects, "Ingress")["spec"]["ingressClassName"] == "c"
    (route,) = of(objects, "HTTPRoute")["spec"]["rules"]
    assert route["timeouts"] == {"request": "5m"}
    assert route["backendRefs"] == [{"name": "asmodel", "port": 81}]
    service = of(objects, "Service")["spec"]
    assert (service["type"], service["ports"][0]["port"], service["ports"][0]["nodePort"]) == ("NodePort", 81, 30_000)
    assert settings(objects)["port"] == container(objects)["ports"][0]["containerPort"] == 9000


def test_pods_can_be_changed_in_kubernetes_own_words() -> None:
    objects = rendered(CHART / "ci" / "everything-values.yaml")
    spec = pod(objects)
    labels = of(objects, "Deployment")["spec"]["template"]["metadata"]
    assert (labels["labels"]["c"], labels["annotations"]["a"], labels["labels"]["team"]) == ("d", "b", "research")
    assert spec["nodeSelector"] == {"kubernetes.io/arch": "amd64"}
    assert spec["tolerations"][0]["key"] == "models"
    assert "nodeAffinity" in spec["affinity"]
    assert spec["priorityClassName"] == "high"
    assert [each["name"] for each in spec["initContainers"]] == ["wait"]
    assert [each["name"] for each in spec["containers"]] == ["asmodel", "beside"]
    assert {"name": "more", "mountPath": "/more"} in container(objects)["volumeMounts"]
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}} in spec["volumes"]
    assert container(objects)["envFrom"] == [{"secretRef": {"name": "upstreams"}}, {"configMapRef": {"name": "more"}}]
    assert spec["serviceAccountName"] == of(objects, "ServiceAccount")["metadata"]["name"] == "models"
    assert of(objects, "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 2
    assert {"asmodel-more", "asmodel-text"} <= {each["metadata"]["name"] for each in objects}
    assert pod(with_values(serviceAccount={"create": False}))["serviceAccountName"] == "default"


def test_the_dashboards_are_there_if_wanted() -> None:
    found = of(with_values(dashboards={"enabled": True}), "ConfigMap", "-dashboards")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {json.loads(text)["title"] for text in found["data"].values()}
    assert set(found["data"]) == {"asmodel-programs.json", "asmodel-upstreams.json"}


def test_the_test_pod_asks_through_the_service_with_the_first_key() -> None:
    objects = with_values(test={"model": "default", "question": "Two?", "timeoutSeconds": 9}, service={"port": 81})
    asking = of(objects, "Pod")
    found = {each["name"]: each.get("value") for each in asking["spec"]["containers"][0]["env"]}
    assert found["ADDRESS"] == "http://asmodel.models.svc:81/v1"
    assert (found["MODEL"], found["QUESTION"], found["TIMEOUT"]) == ("default", "Two?", "9")
    compile(asking["spec"]["containers"][0]["args"][0], "question.py", "exec")
    # It is none of the pods that the Service sends requests to.
    selector = of(objects, "Service")["spec"]["selector"]
    assert not selector.items() <= asking["metadata"]["labels"].items()
    assert selector.items() <= of(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", ["asmodel", "mine", "a" * 53])
def test_names_fit_and_two_releases_do_not_meet(name: str) -> None:
    for each in rendered(values=MINIMAL, name=name):
        assert len(each["metadata"]["name"]) <= 63
        assert each["metadata"]["name"].startswith(name[:40])


def test_no_value_is_without_effect() -> None:
    """Each value that is changed changes what is rendered, or is refused; none is read by nobody."""
    templates = "".join(file.read_text() for file in (CHART / "templates").rglob("*.*"))
    defaults: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())

    def look(table: Mapping[str, Any], before: str) -> None:
        for name, value in table.items():
            assert name in templates or before == "global.", f"{before}{name} is read by no template"
            if isinstance(value, dict) and before + name in ("cache", "persistence", "autoscaling", "shutdown", "test"):
                look(cast("dict[str, Any]", value), f"{before}{name}.")

    look({name: value for name, value in defaults.items() if name != "global"}, "")


# ---- what is refused ----


@BOTH
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"limits": 3}, "additional properties 'limits' not allowed"),
        ({"replicas": "three"}, "'/replicas': got string, want integer"),
        ({"image": {"pullPolicy": "Sometimes"}}, "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ({"cache": {"kind": "disc"}}, "value must be one of 'disk', 'redis', 'memory', 'off'"),
        ({"settings": {"limits": {"cals": 3}}}, "additional properties 'cals' not allowed"),
        ({"settings": {"log": {"format": "xml"}}}, "value must be one of 'console', 'json'"),
        ({"settings": {"upstreams": {"default": {"retries": "many"}}}}, "got string, want integer"),
        ({"programs": {"files": {"a-b.py": ""}}}, "does not match pattern"),
        ({"clientKeys": {"holders": ["Al ice"]}}, "does not match pattern"),
        ({"containerPort": 80}, "minimum"),
        ({"settings": {}}, "No upstream is set"),
        ({"settings": {"port": 9}}, "settings.port is decided by the chart: set containerPort."),
        ({"settings": {"keys": {"a": "b"}}}, "settings.keys is decided by the chart: set clientKeys."),
        ({"settings": {"cache": {"kind": "redis"}}}, "settings.cache.kind is decided by the chart: set cache.kind."),
        ({"settings": {"traces": {"path": "/x"}}}, "settings.traces.path is decided by the chart"),
        (
            {"settings": {"upstreams": {"default": {"model": "m", "api_key": "sk-1"}}}},
            "settings.upstreams.default.api_key would stand in a ConfigMap for all to read",
        ),
        (
            {"settings": {"upstreams": {"default": {"kind": "embedded"}}}},
            "settings.upstreams.default is the embedded model, which is in another image",
        ),
        ({"replicas": 3}, "3 replicas with cache.kind=disk: each would have a cache of its own"),
        ({"replicas": 2, "cache": {"kind": "memory"}}, "2 replicas with cache.kind=memory"),
        ({"autoscaling": {"enabled": True}}, "10 replicas with cache.kind=disk"),
        (
            {"replicas": 2, "cache": {"perReplica": True}, "persistence": {"enabled": True}},
            "a database on one volume must not be opened by several machines",
        ),
        ({"persistence": {"existingClaim": "c"}}, "persistence.existingClaim is set and persistence.enabled is not"),
        ({"cache": {"kind": "redis"}}, "cache.kind=redis needs an address"),
        ({"cache": {"redis": {"url": "redis://v"}}}, "cache.redis is set and cache.kind is disk"),
        ({"cache": {"kind": "redis", "redis": {"url": "redis://:pw@v"}}}, "cache.redis.url holds a password"),
        ({"cache": {"kind": "redis", "redis": {"url": "redis://v", "existingSecret": "s"}}}, "are two addresses"),
        ({"cache": {"options": {"path": "/x"}}}, "cache.options.path has a value of its own"),
        (
            {"shutdown": {"preStopSeconds": 10, "drainSeconds": 30, "gracePeriodSeconds": 30}},
            "is 30, and would cut streams: preStopSeconds and drainSeconds and 10 to close make 50",
        ),
        ({"autoscaling": {"enabled": True, "minReplicas": 20}}, "autoscaling.minReplicas is 20"),
        ({"autoscaling": {"enabled": True, "targetCPU": 0}}, "autoscaling has nothing to go by"),
        ({"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}, "resources.requests.cpu"),
        ({"ingress": {"enabled": True}}, "ingress.enabled needs ingress.hosts"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.enabled needs httpRoute.parentRefs"),
        ({"service": {"nodePort": 30_000}}, "service.nodePort needs service.type"),
    ],
)
def test_values_that_are_wrong_are_refused_in_words(values: dict[str, Any], words: str, major: int) -> None:
    upstreams = values.get("settings", MINIMAL["settings"])
    if upstreams and "upstreams" not in upstreams:
        upstreams = MINIMAL["settings"] | upstreams
    said = template(values={**values, "settings": upstreams}, major=major)
    assert said.code != 0
    assert words in said.errors


def test_all_mistakes_are_told_at_once() -> None:
    said = template(values={"replicas": 2, "ingress": {"enabled": True}})
    assert said.errors.count("\n  - ") == 3
