"""Images, compose file and manifests of `cluster/`: by schema, and for what breaks in use."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_files import (
    CLUSTER,
    DOCKERFILE,
    KUBERNETES_FILES,
    ROOT,
    constraints,
    documents,
    extras,
    name_of,
    of_kind,
)

from dist_dml.errors import STOPPED_EXIT_CODE

BIN = Path(sys.executable).parent


def test_the_dockerfile_is_pinned_and_runs_as_nobody_special() -> None:
    parser = pytest.importorskip("dockerfile_parse", reason="needs dockerfile-parse")
    parsed = parser.DockerfileParser(fileobj=BytesIO(DOCKERFILE.read_bytes()))
    stages: list[list[dict[str, Any]]] = []
    for one in parsed.structure:
        if one["instruction"] == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(one)
    assert [stage[0]["value"].split(" AS ")[1] for stage in stages] == ["mlflow", "dist_dml"]
    assert all(
        re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", image) for image in parsed.parent_images
    )
    copied = set()
    for stage in stages:
        users = [one["value"] for one in stage if one["instruction"] == "USER"]
        assert users[-1:] == ["1000:1000"]
        for one in stage:
            if one["instruction"] == "RUN":
                installs = re.findall(r"pip install[^&]*", one["value"])
                assert all("-c " in line and "--no-cache-dir" in line for line in installs)
            if one["instruction"] == "COPY":
                copied |= set(one["value"].split()[:-1])
            # It would show all GPUs to pods that asked for none.
            assert one["instruction"] != "ENV" or "NVIDIA_VISIBLE_DEVICES" not in one["value"]
    assert all((ROOT / source).exists() for source in copied)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", DOCKERFILE.read_text(), re.MULTILINE))
    assert set(arguments["EXTRAS"].split(",")) <= extras()
    # The build context lets in what is copied, and no secrets.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {source.split("/")[0] for source in copied} <= {
        line[1:] for line in ignored if line[:1] == "!"
    }
    assert "**/.env" in ignored


def test_what_the_files_install_by_name_has_a_pinned_version() -> None:
    pinned = constraints()
    named = {
        "mlflow",
        "psycopg2-binary",
        "boto3",
        "google-api-python-client",
        "s3fs",
        "ray",
        "torch",
    }
    assert named <= pinned.keys()
    if importlib.util.find_spec("ray"):
        assert importlib.metadata.version("ray") == pinned["ray"]


def test_compose_publishes_mlflow_on_the_loopback_alone() -> None:
    path = CLUSTER / "mlflow" / "compose.yaml"
    tool = BIN / "check-jsonschema"
    found = subprocess.run(
        [str(tool), "--builtin-schema", "vendor.compose-spec", str(path)],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    config = yaml.safe_load(path.read_text())
    ports = {name: service.get("ports", []) for name, service in config["services"].items()}
    assert ports == {"database": [], "s3": [], "mlflow": ["127.0.0.1:5000:5000"]}
    # Names that are set nowhere would be empty passwords.
    asked = set(re.findall(r"\$\{(\w+):\?", path.read_text()))
    example = (CLUSTER / "mlflow" / "env.example").read_text().splitlines()
    assert asked == {line[:-1] for line in example if line.endswith("=")}
    assert set(re.findall(r"\$\{(\w+)", path.read_text())) == asked
    build = config["services"]["mlflow"]["build"]
    context = (path.parent / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]) == DOCKERFILE
    assert f" AS {build['target']}\n" in DOCKERFILE.read_text()


def test_mlflows_server_has_the_options_that_it_is_given() -> None:
    found = importlib.util.find_spec("mlflow")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs mlflow")
    # Its command line, unread: importing it takes seconds.
    sources = [Path(found.submodule_search_locations[0]) / name for name in ("cli", "utils")]
    text = (sources[0] / "__init__.py").read_text() + (sources[1] / "cli_args.py").read_text()
    known = set(re.findall(r'"(--[a-z-]+)[/"]', text))
    compose = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())
    deployment = of_kind(CLUSTER / "k8s" / "mlflow.yaml", "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    for words in (compose["services"]["mlflow"]["command"], pod["containers"][0]["args"]):
        assert {word.split("=")[0] for word in words} <= known
        # Anybody who reaches it may read and write: no host but those named.
        assert not any(word == "--allowed-hosts=*" for word in words)


# Fields of KubeRay 1.5.1 to 1.7.0 (its apis/ray/v1); pod templates have a schema of their own.
RAY_JOB_FIELDS = {
    "spec": {
        *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate"),
        *("metadata", "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy"),
        *("entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources"),
        *("entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished", "suspend"),
        "shutdownAfterJobFinishes",
    },
    "cluster": {
        *("authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations"),
        *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion"),
        "workerGroupSpecs",
    },
    "autoscaler": {"resources", "image", "env", "idleTimeoutSeconds", "upscalingMode", "version"},
    "group": {
        *("groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"),
        *("rayStartParams", "template", "numOfHosts", "scaleStrategy", "serviceType"),
    },
}


def is_valid(document: dict[str, Any]) -> None:
    """By the schema of the oldest Kubernetes that train.yaml asks for; unknown fields refused."""
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    kubernetes.validate(document, "1.31", strict=True)


def pods_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Specs of the pods that an object makes."""
    spec = document.get("spec", {})
    if document["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        return [group["template"]["spec"] for group in groups]
    return [spec["template"]["spec"]] if "template" in spec else []


@pytest.mark.parametrize("path", KUBERNETES_FILES, ids=name_of)
def test_kubernetes_knows_every_field_of_the_manifests(path: Path) -> None:
    for document in documents(path):
        if document["kind"] != "RayJob":
            is_valid(document)
    with pytest.raises(Exception, match="mistyped"):
        is_valid({"apiVersion": "v1", "kind": "Service", "metadata": {}, "spec": {"mistyped": 1}})


def test_kuberay_knows_every_field_and_gets_rays_version_and_a_token() -> None:
    job = of_kind(CLUSTER / "k8s" / "rayjob-tune.yaml", "RayJob")
    assert (job["apiVersion"], len(job["metadata"]["name"]) <= 47) == ("ray.io/v1", True)
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert spec.keys() <= RAY_JOB_FIELDS["spec"]
    assert cluster.keys() <= RAY_JOB_FIELDS["cluster"]
    assert cluster["autoscalerOptions"].keys() <= RAY_JOB_FIELDS["autoscaler"]
    for group in [head, *workers]:
        assert group.keys() <= RAY_JOB_FIELDS["group"]
        assert {"template", "rayStartParams"} <= group.keys()
        is_valid(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        )
    assert cluster["rayVersion"] == constraints()["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    # A search that has ended, or hangs, costs nothing for long.
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert spec["activeDeadlineSeconds"] > 0
    assert all(one["minReplicas"] == 0 and one["maxReplicas"] > 0 for one in workers)
    # KubeRay finds the dashboard by its port's name.
    ports = {
        one["name"]: one["containerPort"]
        for one in head["template"]["spec"]["containers"][0]["ports"]
    }
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001}


@pytest.mark.parametrize("path", KUBERNETES_FILES, ids=name_of)
def test_pods_have_shared_memory_no_root_and_secrets_by_reference(path: Path) -> None:
    pods = [pod for document in documents(path) for pod in pods_of(document)]
    assert pods
    assert not any(document["kind"] == "Secret" for document in documents(path))
    for pod in pods:
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"]["memory"]
            mounts = {one["mountPath"]: one["name"] for one in container.get("volumeMounts", [])}
            if not container["image"].startswith("dist_dml-mlflow"):
                volume = next(v for v in pod["volumes"] if v["name"] == mounts["/dev/shm"])
                assert volume["emptyDir"]["medium"] == "Memory"
            for variable in container.get("env", []):
                if re.search(r"PASSWORD|SECRET|ACCESS_KEY", variable["name"]):
                    assert "secretKeyRef" in variable["valueFrom"], variable["name"]


def test_the_job_takes_each_exit_code_for_what_it_means_here() -> None:
    path = CLUSTER / "k8s" / "train.yaml"
    job, service = of_kind(path, "Job"), of_kind(path, "Service")
    spec = job["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    env = {one["name"]: one["value"] for one in container["env"]}
    rules = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert rules == {2: "FailJob", STOPPED_EXIT_CODE: "Ignore"}
    assert {"type": "DisruptionTarget", "status": "True"} in [
        one for r in spec["podFailurePolicy"]["rules"] for one in r.get("onPodConditions", [])
    ]
    assert pod["restartPolicy"] == "Never"
    assert "--resume" in container["args"]
    # All pods or none, and as many workers as GPUs.
    assert spec["completions"] == spec["parallelism"] == int(env["NUM_PODS"])
    assert env["WORKERS_PER_POD"] == container["resources"]["limits"]["nvidia.com/gpu"]
    # Pod 0's name needs the service, and the service all pods.
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert int(env["MASTER_PORT"]) == service["spec"]["ports"][0]["port"]


def test_clients_reach_mlflow_by_a_name_that_it_allows() -> None:
    path = CLUSTER / "k8s" / "mlflow.yaml"
    deployment, port = of_kind(path, "Deployment"), 5000
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    allowed = next(one for one in arguments if one.startswith("--allowed-hosts="))
    assert "*" not in allowed
    namespace = deployment["metadata"]["namespace"]
    service = [d for d in documents(path) if d["kind"] == "Service"][-1]["metadata"]["name"]
    assert f"{service}.{namespace}:{port}" in allowed.split("=")[1].split(",")
    for other in ("train.yaml", "rayjob-tune.yaml"):
        text = (CLUSTER / "k8s" / other).read_text()
        assert f"tracking.mlflow_uri=http://{service}.{namespace}:{port}" in text
        # Else the network policy would keep its pods out.
        assert 'mlflow-client: "true"' in text
