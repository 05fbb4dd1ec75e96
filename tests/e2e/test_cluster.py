"""The chart in a real Kubernetes API server: installed, changed, rolled back where pods must be restricted; refused."""

from __future__ import annotations

import base64
import itertools
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.golang import BUILD_PATIENCE
from tests.e2e.kubernetes import CHART, ROOT, Cluster, Refused
from tests.serving import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

EXAMPLES = sorted((ROOT / "helm" / "examples").glob("*.yaml"))
PODS = {"laptop": 2, "team": 3, "fleet": 2}
"""Those of the chart and of what comes with it. An autoscaler without its controller leaves one."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


NUMBERS = itertools.count()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """One that takes restricted pods only."""
    name = f"models-{next(NUMBERS)}"
    cluster.namespace(name)
    yield name
    cluster.delete(f"/api/v1/namespaces/{name}")


@pytest.mark.timeout(2 * BUILD_PATIENCE)
def test_there_is_a_cluster_that_holds_pods_to_the_restricted_level(cluster: Cluster, namespace: str) -> None:
    assert cluster.get("/version")["gitVersion"].startswith("v1.35")
    root = {"metadata": {"name": "root"}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
    eventually("the account of pods is there", lambda: "default" in cluster.names(namespace, "serviceaccounts"))
    with pytest.raises(Refused, match=r"violates PodSecurity .*restricted"):
        cluster.post(f"/api/v1/namespaces/{namespace}/pods", root)


def toml(cluster: Cluster, namespace: str, release: str) -> dict[str, Any]:
    path = f"/api/v1/namespaces/{namespace}/configmaps/{release}-settings"
    return tomllib.loads(cluster.get(path)["data"]["asmodel.toml"])


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_installed_upgraded_and_rolled_back(
    cluster: Cluster, namespace: str, example: Path, major: int
) -> None:
    def helm(*words: str | Path) -> str:
        said = cluster.helm(*words, "--namespace", namespace, major=major)
        assert said.code == 0, said.errors
        # Every object, with what the level of the namespace and fields that do not exist have to say.
        assert "Warning" not in said.errors
        assert "unknown field" not in said.errors
        return said.output

    notes = helm("install", "asmodel", CHART, "--values", example)
    assert f"helm -n {namespace} test asmodel" in notes
    wanted = PODS[example.stem]
    eventually("the pods are made", lambda: len(cluster.names(namespace)) == wanted)
    # They are made by controllers, which would only report what the server refuses them.
    events = cluster.get(f"/api/v1/namespaces/{namespace}/events")["items"]
    warnings = [event for event in events if event["type"] == "Warning"]
    # The server's own look over addresses may come upon a service between its making and the note of its address.
    assert not [event["message"] for event in warnings if event["reason"] != "ClusterIPNotAllocated"]

    def pod() -> dict[str, Any]:
        (found,) = [each for each in cluster.names(namespace, "deployments", "apis/apps/v1") if each == "asmodel"]
        made = cluster.get(f"/apis/apps/v1/namespaces/{namespace}/deployments/{found}")
        template: dict[str, Any] = made["spec"]["template"]
        return template

    first = pod()
    helm("upgrade", "asmodel", CHART, "--values", example, "--set", "settings.limits.n=3")
    assert toml(cluster, namespace, "asmodel")["limits"]["n"] == 3
    second = pod()
    assert second["metadata"]["annotations"] != first["metadata"]["annotations"]
    helm("rollback", "asmodel", "1")
    assert toml(cluster, namespace, "asmodel").get("limits", {}).get("n") is None
    assert pod() == first
    helm("uninstall", "asmodel")
    assert cluster.names(namespace, "deployments", "apis/apps/v1") == []


def test_keys_that_the_chart_has_made_stay_through_upgrades(cluster: Cluster, namespace: str) -> None:
    values = CHART / "ci" / "plain-values.yaml"

    def key() -> dict[str, str]:
        data: dict[str, str] = cluster.get(f"/api/v1/namespaces/{namespace}/secrets/asmodel-keys")["data"]
        return data

    assert cluster.helm("install", "asmodel", CHART, "-n", namespace, "-f", values).code == 0
    before = key()
    assert base64.b64decode(before["default"]).startswith(b"sk-")
    assert cluster.helm("upgrade", "asmodel", CHART, "-n", namespace, "-f", values).code == 0
    assert key() == before
    assert cluster.helm("rollback", "asmodel", "1", "-n", namespace).code == 0
    assert key() == before


@pytest.mark.parametrize("major", [3, 4])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("settings: { upstreams: { default: { model: m } } }\nreplicas: 3", "each would have a cache of its own"),
        ("settings: { upstreams: { default: { model: m, retrys: x } }, limit: {} }", "'limit' not allowed"),
        ("replica: 3", "additional properties 'replica' not allowed"),
        ("{}", "No upstream is set"),
    ],
)
def test_a_broken_values_file_is_refused_before_anything_is_made(
    cluster: Cluster, namespace: str, tmp_path: Path, values: str, words: str, major: int
) -> None:
    (tmp_path / "values.yaml").write_text(values)
    said = cluster.helm("install", "asmodel", CHART, "-n", namespace, "-f", tmp_path / "values.yaml", major=major)
    assert said.code != 0
    assert words in said.errors
    for kind, api in (("secrets", "api/v1"), ("services", "api/v1"), ("deployments", "apis/apps/v1")):
        assert cluster.names(namespace, kind, api) == []


def test_everything_at_once_is_accepted(cluster: Cluster, namespace: str) -> None:
    for name in ("everything", "disk-volume", "many-disks"):
        said = cluster.helm("install", name, CHART, "-n", namespace, "-f", CHART / "ci" / f"{name}-values.yaml")
        assert said.code == 0, said.errors
    for kind in ("servicemonitors", "podmonitors"):
        assert len(cluster.names(namespace, kind, "apis/monitoring.coreos.com/v1")) == 1
    assert cluster.names(namespace, "httproutes", "apis/gateway.networking.k8s.io/v1") == ["everything-models"]


def test_the_pod_of_helm_test_is_accepted(cluster: Cluster, namespace: str) -> None:
    assert cluster.helm("install", "asmodel", CHART, "-n", namespace, "-f", EXAMPLES[1]).code == 0
    # There is no machine that would run it, so Helm waits in vain.
    said = cluster.helm("test", "asmodel", "-n", namespace, "--timeout", "3s")
    assert said.code != 0
    assert "asmodel-test" in cluster.names(namespace)
