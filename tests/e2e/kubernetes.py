"""Helm, and a real Kubernetes API server with etcd and the controllers that make pods, each built from source.

`kubernetes/` beside this file is a Go module of ours that names them and pins everything they are made of. There is no
machine that would run a pod: what is shown is what the server accepts, and refuses. `python -m tests.e2e.kubernetes`
builds all of it, starts a cluster and says how to ask it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import yaml
from tests.e2e import golang
from tests.redis_serving import free_port
from tests.serving import PATIENCE, eventually

ROOT = Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "helm" / "asmodel"
MODULE = Path(__file__).with_name("kubernetes")

SERVER = "1.35.4"
"""The version of Kubernetes that is run."""
VERSIONS = ("1.29.6", "1.32.13", SERVER, "1.37.2")
"""Those whose schemas manifests are held against: from the oldest that the chart takes on."""

PACKAGES = {
    "helm3": "helm.sh/helm/v3/cmd/helm",
    "helm4": "helm.sh/helm/v4/cmd/helm",
    "kubeconform": "github.com/yannh/kubeconform/cmd/kubeconform",
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
}
KINDS = (
    *("Deployment", "StatefulSet", "Pod", "Service", "ServiceAccount", "ConfigMap", "Secret", "PersistentVolumeClaim"),
    *("Ingress", "NetworkPolicy", "HorizontalPodAutoscaler", "PodDisruptionBudget"),
)
"""Kubernetes' own kinds that the chart and its examples make; of another no schema is found, which is a mistake too."""
CUSTOM = (
    ("sigs.k8s.io/gateway-api", "v1.3.0", "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"),
    *(
        ("github.com/prometheus-operator/prometheus-operator", "v0.85.0", f"example/prometheus-operator-crd/{file}")
        for file in ("monitoring.coreos.com_servicemonitors.yaml", "monitoring.coreos.com_podmonitors.yaml")
    ),
)
"""Where the definitions of what is not Kubernetes' own are: a Go module, its version, and the file."""


def tool(name: str) -> str:
    """One of PACKAGES, built first if it is not there. Raises EnvironmentUnavailable."""
    # What a program says of its own version is told to it when it is built; by it Helm knows what it talks to.
    flags = f"-X k8s.io/component-base/version.gitVersion=v{SERVER}" if name.startswith("kube-") else ""
    return str(golang.binary(MODULE, PACKAGES[name], name, ldflags=flags))


# ---- Helm, without a cluster ----


@dataclass(frozen=True)
class Said:
    code: int
    output: str
    errors: str


def helm(*words: str | Path, major: int = 4, environment: Mapping[str, str] | None = None) -> Said:
    """What Helm said, with homes of its own."""
    with tempfile.TemporaryDirectory(prefix="asmodel-helm-") as home:
        homes = {f"HELM_{what}_HOME": str(Path(home) / what) for what in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [tool(f"helm{major}"), *map(str, words)],
            env={"PATH": os.environ.get("PATH", os.defpath), "HOME": home, **homes, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    return Said(done.returncode, done.stdout, done.stderr)


def rendered(
    *files: Path,
    values: Mapping[str, Any] | None = None,
    version: str = SERVER,
    apis: Sequence[str] = (),
    name: str = "asmodel",
    namespace: str = "models",
    major: int = 4,
) -> list[dict[str, Any]]:
    """The objects that the chart makes of values files, and of `values` on top. Fails with what Helm says."""
    said = template(*files, values=values, version=version, apis=apis, name=name, namespace=namespace, major=major)
    assert said.code == 0, said.errors
    return [each for each in yaml.safe_load_all(said.output) if each]


def template(
    *files: Path,
    values: Mapping[str, Any] | None = None,
    version: str = SERVER,
    apis: Sequence[str] = (),
    name: str = "asmodel",
    namespace: str = "models",
    major: int = 4,
) -> Said:
    words: list[str | Path] = ["template", name, CHART, "--namespace", namespace, "--kube-version", version]
    words += [word for file in files for word in ("--values", file)]
    words += [word for api in apis for word in ("--api-versions", api)]
    with tempfile.TemporaryDirectory(prefix="asmodel-values-") as folder:
        if values is not None:
            more = Path(folder) / "values.yaml"
            more.write_text(json.dumps(values))
            words += ["--values", more]
        return helm(*words, major=major)


# ---- schemas ----


def schemas(version: str) -> Path:
    """A folder with the schema of each kind of that version, and of the custom ones, as kubeconform reads them."""
    folder = golang.cache() / f"schemas-{version}-3"
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(prefix=".schemas-", dir=golang.cache()))
        for name, schema in _schemas(version):
            (partial / name).write_text(json.dumps(schema))
        try:
            partial.replace(folder)
        except OSError:  # Somebody else was sooner.
            shutil.rmtree(partial)
    return folder


def _schemas(version: str) -> Iterator[tuple[str, dict[str, Any]]]:
    document = golang.downloaded("k8s.io/kubernetes", f"v{version}") / "api" / "openapi-spec" / "swagger.json"
    definitions: dict[str, Any] = json.loads(document.read_text())["definitions"]
    for name, schema in definitions.items():
        for kind in schema.get("x-kubernetes-group-version-kind", ()):
            if kind["kind"] in KINDS:
                where = "-".join(filter(None, (kind["group"].split(".")[0], kind["version"])))
                # Each whole by itself: kubeconform would read all definitions again for each object.
                needed = {each: _closed(definitions[each]) for each in _reached(definitions, name)}
                yield f"{kind['kind'].lower()}-{where}.json", {"$ref": f"#/definitions/{name}", "definitions": needed}
    for file in custom():
        written = yaml.safe_load(file.read_text())
        for each in written["spec"]["versions"]:
            group = written["spec"]["group"].split(".")[0]
            schema = _closed(each["schema"]["openAPIV3Schema"])
            yield f"{written['spec']['names']['kind'].lower()}-{group}-{each['name']}.json", schema


def _reached(definitions: Mapping[str, Any], name: str) -> set[str]:
    """That definition, and those that it comes to."""
    found: set[str] = set()
    open_ends = [name]
    while open_ends:
        each = open_ends.pop()
        if each not in found:
            found.add(each)
            open_ends += re.findall(r'"#/definitions/([^"]+)"', json.dumps(definitions[each]))
    return found


def _closed(node: Any) -> Any:
    """The schema such that what it does not name is refused, as the server does where it is asked to be strict."""
    if isinstance(node, list):
        return [_closed(each) for each in cast("Any", node)]
    if not isinstance(node, dict):
        return node
    table = cast("dict[str, Any]", node)
    if "$ref" in table:
        return {"$ref": table["$ref"]}
    if table.get("format") == "int-or-string" or table.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made: dict[str, Any] = {}
    for name, each in table.items():
        if name == "properties":
            made[name] = {inner: _closed(what) for inner, what in each.items()}
        elif name in ("items", "additionalProperties", "allOf", "anyOf", "oneOf", "not"):
            made[name] = _closed(each)
        elif name in ("type", "required", "enum", "minimum", "maximum", "pattern", "minLength", "maxLength"):
            made[name] = each
    if "properties" in made and "additionalProperties" not in made:
        made["additionalProperties"] = bool(table.get("x-kubernetes-preserve-unknown-fields"))
    return made


def custom() -> list[Path]:
    """The files that define what is not Kubernetes' own."""
    return [golang.downloaded(module, version) / file for module, version, file in CUSTOM]


def validated(manifests: str, version: str) -> str:
    """What kubeconform has against the manifests; empty if nothing."""
    where = f"{schemas(version)}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    command = [tool("kubeconform"), "-strict", "-summary", "-kubernetes-version", version, "-schema-location", where]
    done = subprocess.run(command, input=manifests, capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


# ---- a cluster ----


class Refused(Exception):
    """The API server said no; its own words, and the status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Cluster:
    """etcd, the API server, and the controllers that make pods of deployments; on loopback, with a token of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._token = secrets.token_hex(24)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._port = free_port()
        self.kubeconfig = folder / "kubeconfig"
        self._certificates = folder / "certificates"
        self._trust: ssl.SSLContext | None = None

    def start(self) -> Cluster:
        # Built before any clock runs.
        programs = {name: tool(name) for name in ("etcd", "kube-apiserver", "kube-controller-manager")}
        store, peers = free_port(), free_port()
        (self._folder / "tokens.csv").write_text(f'{self._token},admin,admin,"system:masters"\n')
        etcd = f"http://127.0.0.1:{store}"
        peer = f"http://127.0.0.1:{peers}"
        try:
            self._run(
                "etcd",
                [
                    programs["etcd"],
                    f"--data-dir={self._folder / 'etcd'}",
                    f"--listen-client-urls={etcd}",
                    f"--advertise-client-urls={etcd}",
                    f"--listen-peer-urls={peer}",
                    f"--initial-advertise-peer-urls={peer}",
                    f"--initial-cluster=default={peer}",
                    "--unsafe-no-fsync",
                    "--log-level=warn",
                ],
            )
            # The certificate that it makes for itself comes with a key, which is as good as any to sign tokens with.
            key = self._certificates / "apiserver.key"
            self._run(
                "kube-apiserver",
                [
                    programs["kube-apiserver"],
                    f"--etcd-servers={etcd}",
                    f"--secure-port={self._port}",
                    "--bind-address=127.0.0.1",
                    "--advertise-address=127.0.0.1",
                    f"--cert-dir={self._certificates}",
                    f"--token-auth-file={self._folder / 'tokens.csv'}",
                    "--authorization-mode=RBAC",
                    "--service-cluster-ip-range=10.0.0.0/24",
                    "--service-account-issuer=https://127.0.0.1",
                    f"--service-account-signing-key-file={key}",
                    f"--service-account-key-file={key}",
                    "--endpoint-reconciler-type=none",
                ],
            )
            eventually("the API server is ready", self._ready, 120.0)
            self._write_kubeconfig()
            self._run(
                "kube-controller-manager",
                [
                    programs["kube-controller-manager"],
                    f"--kubeconfig={self.kubeconfig}",
                    "--controllers=deployment-controller,replicaset-controller,statefulset-controller,"
                    "serviceaccount-controller,namespace-controller,garbage-collector-controller",
                    "--leader-elect=false",
                    "--secure-port=0",
                ],
            )
            for file in custom():
                self.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(file.read_text()))
            for path in ("gateway.networking.k8s.io/v1", "monitoring.coreos.com/v1"):
                eventually(f"{path} is served", lambda path=path: self._served(f"/apis/{path}"), 60.0)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        # The last first: none is left to complain that another has gone.
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(PATIENCE)
        self._processes = []

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.log").open("ab") as log:
            environment = {"PATH": os.environ.get("PATH", os.defpath), "HOME": str(self._folder)}
            process = subprocess.Popen(
                command, cwd=self._folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)

    def said(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _ready(self) -> bool:
        for process in self._processes:
            assert process.poll() is None, "one of them has ended:\n" + self.said("kube-apiserver")[-3_000:]
        try:
            if self._trust is None:
                self._trust = ssl.create_default_context(cafile=str(self._certificates / "apiserver.crt"))
            self.get("/readyz")
            # Made by the server itself some moments after it is ready.
            self.get("/api/v1/namespaces/default")
            return True
        except (OSError, Refused, ValueError):
            return False

    def _served(self, path: str) -> bool:
        try:
            self.get(path)
            return True
        except Refused:
            return False

    def _write_kubeconfig(self) -> None:
        cluster = {
            "server": f"https://127.0.0.1:{self._port}",
            "certificate-authority": str(self._certificates / "apiserver.crt"),
        }
        written = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": self._token}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin"}}],
            "current-context": "here",
        }
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(json.dumps(written))

    # -- asking

    def helm(self, *words: str | Path, major: int = 4) -> Said:
        return helm(*words, "--kubeconfig", self.kubeconfig, major=major)

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: object) -> Any:
        return self._ask("POST", path, body)

    def delete(self, path: str) -> Any:
        return self._ask("DELETE", path)

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(
            f"https://127.0.0.1:{self._port}{path}",
            None if body is None else json.dumps(body, default=str).encode(),
            {"authorization": f"Bearer {self._token}", "content-type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE, context=self._trust) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from None
        return json.loads(text) if text.startswith(b"{") else text.decode()

    def namespace(self, name: str, level: str = "restricted") -> None:
        """One that holds its pods to that level of the Pod Security Standards."""
        labels = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
        self.post("/api/v1/namespaces", {"metadata": {"name": name, "labels": labels}})

    def names(self, namespace: str, kind: str = "pods", api: str = "api/v1") -> list[str]:
        return [each["metadata"]["name"] for each in self.get(f"/{api}/namespaces/{namespace}/{kind}")["items"]]


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="asmodel-cluster-") as folder, Cluster(Path(folder)) as cluster:
        print(f"export KUBECONFIG={cluster.kubeconfig}; alias helm={tool('helm4')}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
