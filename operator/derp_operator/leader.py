"""Leader election with a Lease: of several operators one works, the others wait.

The protocol is that of client-go's leaderelection: a Lease is free when its holder has not renewed it for its duration,
as seen by our own clock from the moment we saw the last renewal; clocks of other machines do not matter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from .kube import ApiError, Kube, Object

DURATION: Final = 15
RENEW_EVERY: Final = 5.0
GIVE_UP_AFTER: Final = 10.0
RETRY_EVERY: Final = 2.0

log = logging.getLogger(__name__)


class LeaseLostError(Exception):
    """Another operator may work now: stop at once."""


class Leadership:
    """One candidate for the Lease `name`.  `clock` is monotonic, in seconds; no two candidates share an `identity`."""

    def __init__(self, kube: Kube, namespace: str, name: str, identity: str, clock: Callable[[], float]) -> None:
        self._kube, self._namespace, self._name = kube, namespace, name
        self._identity, self._clock = identity, clock
        self._observed: tuple[object, float] | None = None

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        while True:
            try:
                if await self._try():
                    return
            except ApiError as error:
                log.warning("lease %s/%s: %s", self._namespace, self._name, error)
            await asyncio.sleep(RETRY_EVERY)

    async def hold(self) -> None:
        """Renew the Lease until cancelled.  Raises `LeaseLostError`."""
        renewed = self._clock()
        while True:
            await asyncio.sleep(RENEW_EVERY)
            try:
                async with asyncio.timeout(RENEW_EVERY):
                    if not await self._try():
                        raise LeaseLostError(f"another operator holds the lease {self._namespace}/{self._name}")
                renewed = self._clock()
            except (ApiError, TimeoutError) as error:
                if self._clock() - renewed > GIVE_UP_AFTER:
                    raise LeaseLostError(f"the lease could not be renewed for {GIVE_UP_AFTER:g} s: {error}") from error

    async def release(self) -> None:
        """Let the next candidate in without a wait."""
        try:
            lease = await self._kube.get("Lease", self._namespace, self._name)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._kube.replace(lease)
        except ApiError as error:
            log.warning("lease %s/%s was not released: %s", self._namespace, self._name, error)

    async def _try(self) -> bool:
        lease = await self._kube.get("Lease", self._namespace, self._name)
        try:
            if lease is None:
                await self._kube.create(self._lease())
                return True
            if not self._free(lease["spec"]):
                return False
            lease["spec"] = lease["spec"] | self._spec(lease["spec"])
            await self._kube.replace(lease)
        except ApiError as error:
            if error.status == 409:  # another candidate was faster
                return False
            raise
        return True

    def _free(self, spec: dict[str, Any]) -> bool:
        holder = spec.get("holderIdentity")
        if not holder or holder == self._identity:
            return True
        record = (holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if self._observed is None or self._observed[0] != record:
            self._observed = (record, self._clock())
        return self._clock() - self._observed[1] > float(spec.get("leaseDurationSeconds", DURATION))

    def _lease(self) -> Object:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace},
            "spec": self._spec({}),
        }

    def _spec(self, old: dict[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        same = old.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION,
            "acquireTime": old.get("acquireTime", now) if same else now,
            "renewTime": now,
            "leaseTransitions": old.get("leaseTransitions", 0) + (0 if same or not old else 1),
        }
