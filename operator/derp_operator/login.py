"""How the operator proves who it is: its service account in a pod, a kubeconfig elsewhere."""

from __future__ import annotations

import dataclasses
import os

import kopf

from derper.text import host_port


class LoginError(Exception):
    """There are no credentials.  The message says what to do."""


def login() -> kopf.ConnectionInfo:
    """The credentials as they are now: tokens in pods are renewed every hour.  Raises `LoginError`."""
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings)
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if found and host:
        # The address rather than the name: the operator must work while the cluster's DNS does not.
        return dataclasses.replace(found, server=f"https://{host_port(host, port)}")
    try:
        found = found or kopf.login_with_kubeconfig(settings=settings)
    except OSError as error:
        raise LoginError(f"The kubeconfig {error.filename} cannot be read: {error.strerror}.") from None
    if found is None:
        raise LoginError("No Kubernetes credentials: run in a pod, or set KUBECONFIG to a kubeconfig file.")
    return found
