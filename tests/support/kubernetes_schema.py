"""A strict check of the manifests in deploy/kubernetes/: fields of the resources that they use, and the fields' types.

Kubernetes drops or refuses a field that it does not know, and only when a manifest is applied. The tables below name
the fields that a manifest here may use. `crd_problems` checks a manifest against a whole definition of a resource, such
as those that KubeRay and the training operator install, where a test is given one.
"""

from __future__ import annotations

from typing import Any

QUANTITY = (int, str)
MAP = {"*": str}
RESOURCES = {"requests": {"*": QUANTITY}, "limits": {"*": QUANTITY}}
POD_SECURITY = {
    "runAsNonRoot": bool, "runAsUser": int, "runAsGroup": int, "fsGroup": int, "fsGroupChangePolicy": str,
    "seccompProfile": {"type!": str, "localhostProfile": str},
}  # fmt: skip
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": bool, "capabilities": {"drop": [str], "add": [str]}, "readOnlyRootFilesystem": bool,
    "runAsNonRoot": bool, "privileged": bool,
}  # fmt: skip
CONTAINER = {
    "name!": str, "image": str, "command": [str], "args": [str], "env": [{"name!": str, "value": str}],
    "resources": RESOURCES, "securityContext": CONTAINER_SECURITY,
    "volumeMounts": [{"name!": str, "mountPath!": str, "readOnly": bool}],
}  # fmt: skip
VOLUME = {
    "name!": str, "emptyDir": {"medium": str, "sizeLimit": QUANTITY},
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
}  # fmt: skip
POD = {
    "containers!": [CONTAINER], "volumes": [VOLUME], "securityContext": POD_SECURITY, "nodeSelector": MAP,
    "terminationGracePeriodSeconds": int, "automountServiceAccountToken": bool,
}  # fmt: skip
TEMPLATE = {"metadata": {"labels": MAP, "annotations": MAP}, "spec": POD}
METADATA = {"name!": str, "namespace": str, "labels": MAP, "annotations": MAP}
PYTORCH_JOB = {
    "apiVersion!": str, "kind!": str, "metadata!": METADATA,
    "spec!": {
        "runPolicy": {"cleanPodPolicy": str, "backoffLimit": int, "ttlSecondsAfterFinished": int},
        "pytorchReplicaSpecs!": {"*": {"replicas": int, "restartPolicy": str, "template": TEMPLATE}},
    },
}  # fmt: skip
RAY_JOB = {
    "apiVersion!": str, "kind!": str, "metadata!": METADATA,
    "spec!": {
        "entrypoint": str, "submissionMode": str, "backoffLimit": int, "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "headGroupSpec!": {"rayStartParams": MAP, "template!": TEMPLATE},
            "workerGroupSpecs": [{
                "groupName!": str, "replicas": int, "minReplicas!": int, "maxReplicas!": int, "rayStartParams": MAP,
                "template!": TEMPLATE,
            }],
        },
    },
}  # fmt: skip


def problems(value: Any, schema: Any, path: str = "") -> list[str]:
    """What a manifest has wrong, each as "path: problem".

    Args:
        schema: a type or a tuple of types; a list with the schema of its items; or a dict with the schema of each
            field, where "*" stands for any name, and a name with "!" is required.
    """
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [found for at, item in enumerate(value) for found in problems(item, schema[0], f"{path}[{at}]")]
    if not isinstance(schema, dict):
        types = schema if isinstance(schema, tuple) else (schema,)
        return [] if type(value) in types else [f"{path}: {value!r} is no {'/'.join(t.__name__ for t in types)}"]
    if not isinstance(value, dict):
        return [f"{path}: not an object"]
    fields = {name.rstrip("!"): kind for name, kind in schema.items()}
    needed = [name[:-1] for name in schema if name.endswith("!")]
    found = [f"{path}.{name}: missing" for name in needed if name not in value]
    for name, item in value.items():
        if name in fields or "*" in fields:
            found += problems(item, fields.get(name, fields.get("*")), f"{path}.{name}")
        else:
            found.append(f"{path}.{name}: unknown field")
    return found


_TYPES = {"string": str, "integer": int, "boolean": bool, "number": (int, float)}


def crd_problems(value: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """The same by the `openAPIV3Schema` of a CustomResourceDefinition."""
    if schema.get("x-kubernetes-int-or-string"):
        return [] if type(value) in (int, str) else [f"{path}: {value!r} is no quantity"]
    kind = schema.get("type")
    if kind == "array":
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [p for at, item in enumerate(value) for p in crd_problems(item, schema["items"], f"{path}[{at}]")]
    if kind == "object":
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        fields, rest = schema.get("properties", {}), schema.get("additionalProperties")
        if not fields and rest is None:  # such as metadata, which the API server checks
            return []
        found = [f"{path}.{name}: missing" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            inner = fields.get(name, rest)
            found += crd_problems(item, inner, f"{path}.{name}") if inner else [f"{path}.{name}: unknown field"]
        return found
    if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (kind != "boolean" and isinstance(value, bool))):
        return [f"{path}: {value!r} is no {kind}"]
    return [f"{path}: {value!r} is not in {schema['enum']}"] if "enum" in schema and value not in schema["enum"] else []
