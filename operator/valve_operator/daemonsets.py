# SPDX-License-Identifier: Apache-2.0
"""The DaemonSets of node agent and device plugin, from the templates that the chart mounts. Pure but for
`read`.

One DaemonSet of each for the whole cluster, on the nodes labelled valve.io/managed: so no node ever has two
agents, however policies overlap or change, and no change of a policy restarts an agent. What the template
says about images, update strategy, tolerations and rights is the administrator's and stays as it is.

Each is owned by the ConfigMap that holds the templates: an uninstall deletes that, and the garbage collector
the DaemonSets, whether an operator still runs or not. No finalizer.
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from valve_api.names import LABEL_MANAGED
from valve_operator.errors import TemplateError
from valve_operator.views import ANNOTATION_DIGEST

Json = dict[str, Any]

FILES = ("agent.yaml", "device-plugin.yaml")
LABEL_MADE_BY = "app.kubernetes.io/managed-by"
MADE_BY = "valve-operator"


def read(folder: Path) -> list[Json]:
    """The templates of a folder. Raises TemplateError."""
    return [_read(folder / name) for name in FILES]


def manifest(template: Json, namespace: str, owner_name: str, owner_uid: str) -> Json:
    """The DaemonSet to apply: in the namespace, owned by the ConfigMap, on managed nodes only."""
    made = copy.deepcopy(template)
    meta, spec = made["metadata"], made["spec"]
    meta["namespace"] = namespace
    meta["labels"] = {**(meta.get("labels") or {}), LABEL_MADE_BY: MADE_BY}
    meta["ownerReferences"] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "name": owner_name, "uid": owner_uid, "controller": True}
    ]
    pod = spec["template"]["spec"]
    pod["nodeSelector"] = {**(pod.get("nodeSelector") or {}), LABEL_MANAGED: "true"}
    text = json.dumps(made, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:32]
    meta["annotations"] = {**(meta.get("annotations") or {}), ANNOTATION_DIGEST: digest}
    return made


def _read(path: Path) -> Json:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise TemplateError(
            f"{path}: {error.strerror}; --node-templates must hold {' and '.join(FILES)}"
        ) from error
    except yaml.YAMLError as error:
        raise TemplateError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or (found.get("apiVersion"), found.get("kind")) != (
        "apps/v1",
        "DaemonSet",
    ):
        raise TemplateError(f"{path}: must be one DaemonSet of apps/v1")
    for path_text, steps in (
        ("metadata.name", ("metadata", "name")),
        ("spec.selector.matchLabels", ("spec", "selector", "matchLabels")),
        ("spec.template.spec.containers", ("spec", "template", "spec", "containers")),
    ):
        value: Any = found
        for step in steps:
            value = value.get(step) if isinstance(value, dict) else None
        if not value:
            raise TemplateError(f"{path}: {path_text} is missing")
    return found
