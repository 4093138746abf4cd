"""Just enough of a Kubernetes client to see when the cluster is ready."""

from __future__ import annotations

import http.client
import json
import ssl
from datetime import datetime
from pathlib import Path
from typing import Any

from dev.cluster import network


class Api:
    """Reads from the API server as the administrator; `pki` is the directory with ca.crt, admin.crt and admin.key."""

    def __init__(self, pki: Path) -> None:
        self._pki = pki

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; raises OSError while nobody answers."""
        context = ssl.create_default_context(cafile=str(self._pki / "ca.crt"))
        context.load_cert_chain(self._pki / "admin.crt", self._pki / "admin.key")
        connection = http.client.HTTPSConnection(network.HOST, 6443, timeout=5, context=context)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ready(self) -> bool:
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def _object(self, path: str) -> dict[str, Any]:
        try:
            status, body = self.get(path)
        except OSError:
            return {}
        found: dict[str, Any] = json.loads(body) if status == 200 else {}
        return found

    def node_ready(self, name: str, since: datetime) -> bool:
        """Whether the kubelet has said so at `since` or later: a lost node stays Ready for a while."""
        conditions = self._object(f"/api/v1/nodes/{name}").get("status", {}).get("conditions", [])
        return any(
            condition["type"] == "Ready"
            and condition["status"] == "True"
            and datetime.fromisoformat(condition["lastHeartbeatTime"]) >= since
            for condition in conditions
        )

    def deployment_ready(self, namespace: str, name: str) -> bool:
        status = self._object(f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}").get("status", {})
        return bool(status.get("readyReplicas"))
