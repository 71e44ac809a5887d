# SPDX-License-Identifier: Apache-2.0
"""The API server's own OpenAPI documents as the JSON schemas that kubeconform reads.

Why it exists: schemas from elsewhere lag behind, know no CRDs of ours and forget fields. What a running API
server publishes is what it will take. Objects are closed, so that a misspelt field is found.

Threading model: none of its own. Called by conftest.py.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from e2e.cluster.kubectl import Kubectl, Refused

GVK = "x-kubernetes-group-version-kind"
OPEN = ("additionalProperties", "x-kubernetes-preserve-unknown-fields")

IGNORED = ("default", "format")


def write(kubectl: Kubectl, folder: Path) -> str:
    """One file per kind below `folder`; the -schema-location for kubeconform."""
    for path, document in sorted(documents(kubectl).items()):
        if path == "api/v1" or path.startswith("apis/"):
            schemas = document.get("components", {}).get("schemas", {})
            components = {"components": {"schemas": {name: closed(each) for name, each in schemas.items()}}}
            for name, schema in schemas.items():
                for kind in schema.get(GVK, ()):
                    if "apiVersion" in schema.get("properties", {}):
                        file = folder / file_name(kind)
                        file.write_text(json.dumps({"$ref": f"#/components/schemas/{name}", **components}))
    return f"{folder}/{{{{ .ResourceKind }}}}_{{{{ .Group }}}}_{{{{ .ResourceAPIVersion }}}}.json"


def documents(kubectl: Kubectl) -> dict[str, Any]:
    """Path -> document. For seconds after a CRD came or went the index and what it names disagree; then it
    is read again, for up to a minute. Raises Refused."""
    deadline = time.monotonic() + 60
    while True:
        index = json.loads(kubectl("get", "--raw", "/openapi/v3"))["paths"]
        try:
            return {path: json.loads(kubectl("get", "--raw", f"/openapi/v3/{path}")) for path in index}
        except Refused:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def file_name(kind: dict[str, str]) -> str:
    """As kubeconform fills the template: the kind in lower case; the core's group is its version."""
    return f"{kind['kind'].lower()}_{kind['group'] or kind['version']}_{kind['version']}.json"


def closed(schema: Any) -> Any:
    """Every object that lists its fields takes no other; OpenAPI's words become JSON schema's."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key not in (*IGNORED, "properties")}
    if "properties" in schema:
        made["properties"] = {name: closed(inner) for name, inner in schema["properties"].items()}
    if "properties" in made and not any(word in made for word in OPEN):
        made["additionalProperties"] = False
    if made.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made
