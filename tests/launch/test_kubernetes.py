"""The manifests of deploy/kubernetes/: fields and types, rights, resources, and the command that they start."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schema import PYTORCH_JOB, RAY_JOB, crd_problems, problems

REPOSITORY = Path(__file__).parents[2]
SCHEMAS = {"pytorchjob.yaml": PYTORCH_JOB, "rayjob.yaml": RAY_JOB}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "deploy/kubernetes" / name).read_text())


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod of a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from pods(item)


def test_every_manifest_is_checked() -> None:
    assert {file.name for file in (REPOSITORY / "deploy/kubernetes").glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_fields_and_types_are_known(name: str) -> None:
    assert problems(manifest(name), SCHEMAS[name]) == []


@pytest.mark.parametrize("name", SCHEMAS)
def test_pods_have_few_rights_bounds_a_volume_and_a_place_for_the_digest(name: str) -> None:
    found = list(pods(manifest(name)))
    assert len(found) == 2
    for pod in found:
        security = pod["securityContext"]
        assert security["runAsNonRoot"] and security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["runAsUser"] > 0 and security["fsGroup"] > 0 and not pod["automountServiceAccountToken"]
        assert "claimName" in pod["volumes"][0]["persistentVolumeClaim"]
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert re.fullmatch(r"registry\.example/[\w-]+@sha256:0{64}", container["image"])
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"]) and "memory" in resources["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_devices_are_asked_for_where_runs_are() -> None:
    head, worker = pods(manifest("rayjob.yaml"))
    assert "nvidia.com/gpu" in worker["containers"][0]["resources"]["limits"]
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]
    spec = manifest("rayjob.yaml")["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in head["containers"][0]["env"]


def test_the_command_of_the_rayjob_is_one_of_the_sweep() -> None:
    words = shlex.split(manifest("rayjob.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "bert_glue.sweep"] and words[3:5] == ["--executor", "ray"]
    done = subprocess.run(
        [sys.executable, *words[1:], "--dry_run"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("to start: ") == 15, done.stderr
    claim = manifest("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert words[words.index("--output_dir") + 1].startswith(claim["volumeMounts"][0]["mountPath"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda job: job["spec"].update(entryPoint="x"), ".spec.entryPoint: unknown field"),
        (lambda job: job["spec"].update(backoffLimit="3"), ".spec.backoffLimit: '3' is no int"),
        (lambda job: job["spec"].update(shutdownAfterJobFinishes=1), ".spec.shutdownAfterJobFinishes: 1 is no bool"),
        (lambda job: job["metadata"].clear(), ".metadata.name: missing"),
        (
            lambda job: job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            ".spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus: 0 is no str",
        ),
        (
            lambda job: job["spec"]["rayClusterSpec"].update(workerGroupSpecs={}),
            ".spec.rayClusterSpec.workerGroupSpecs: not a list",
        ),
    ],
)
def test_a_wrong_manifest_is_found(change: Any, problem: str) -> None:
    job = copy.deepcopy(manifest("rayjob.yaml"))
    change(job)
    assert problems(job, RAY_JOB) == [problem]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_operators_own_definitions_accept_it(name: str) -> None:
    """BERT_GLUE_CRDS is a folder with the CustomResourceDefinitions that the operators install, as YAML."""
    folder = os.environ.get("BERT_GLUE_CRDS")
    if not folder:
        pytest.skip("BERT_GLUE_CRDS names no folder with definitions of resources")
    job = manifest(name)
    group, _, version = job["apiVersion"].partition("/")
    for file in Path(folder).glob("*.yaml"):
        for found in yaml.load_all(file.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if found and found["spec"]["group"] == group and found["spec"]["names"]["kind"] == job["kind"]:
                schema = next(v["schema"] for v in found["spec"]["versions"] if v["name"] == version)
                assert crd_problems(job, schema["openAPIV3Schema"]) == []
                job["spec"]["unheardOf"] = 1
                assert crd_problems(job, schema["openAPIV3Schema"]) == [".spec.unheardOf: unknown field"]
                return
    pytest.fail(f"no definition of {job['kind']} in {folder}")
