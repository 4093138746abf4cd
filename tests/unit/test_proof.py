"""The reconciler's proof: specs out of the CRD's schema against an API server in memory."""

from __future__ import annotations

from collections import Counter

from hypothesis import assume, event, given

from .fakeworld import World
from .proof import examples, fingerprint, quick_yaml, same, wrongs
from .specs import SETTLED, Spec, get, put, specs

__all__ = ["quick_yaml"]


async def settled(*walk: Spec) -> World:
    """A world that went through these specs, one after the other."""
    place = World()
    for spec in walk:
        await place.want(spec)
        await place.settle()
    return place


async def is_ready(place: World) -> bool:
    return bool((await place.ready())["status"] == "True")


def onto(spec: Spec, fixed: Spec) -> Spec:
    """`spec` with what cannot be changed taken from `fixed`."""
    for path in SETTLED:
        value = get(fixed, path)
        if value is not None or get(spec, path) is not None:
            spec = put(spec, path, value)
    return spec


@given(spec=specs())
@examples(15)
async def test_a_second_pass_writes_nothing(spec: Spec) -> None:
    place = await settled(spec)
    reason = (await place.ready())["reason"]
    event(reason)
    assume(reason != "ChildRefused")  # what is refused is tried again
    place.writes.clear()
    await place.reconcile()
    assert place.writes == Counter()


@given(first=specs(), second=specs())
@examples(8)
async def test_however_a_region_got_there_it_is_the_same(first: Spec, second: Spec) -> None:
    fresh = await settled(second)
    walked = await settled(first, second)
    whole = await is_ready(fresh)
    event(f"whole: {whole}")
    assert same(fingerprint(fresh), fingerprint(walked), whole=whole) == ""
    assert [*wrongs(walked)] == []


@given(first=specs(), second=specs())
@examples(6)
async def test_there_and_back_is_as_never_gone(first: Spec, second: Spec) -> None:
    stayed = await settled(first)
    back = await settled(first, second, first)
    assert same(fingerprint(stayed), fingerprint(back), whole=await is_ready(stayed)) == ""
    assert [*wrongs(back)] == []
