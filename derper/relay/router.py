"""Who is connected here, who is reachable through which mesh peer, and who must be told (derpserver.go).

The table holds these kinds of facts:

* **local clients**: for each key its active session.  A key may be connected more than once (a client
  that changed networks, or a cloned key); then the session that spoke last is the active one.
* **clients of other workers** of this node, see `siblings`.
* **forwarders**: for each key of a client on another relay of the region, the mesh peer that leads to
  it.  The first one registered is used; others take over when it goes.
* **moves**: the clients that have just left, and what waits for them, see `moves`.
* **interest**: the watchers (mesh peers) that hear of every arrival and departure, and for each key the
  sessions that received packets from it, which are told when it leaves the region.

A client of this node always wins over a forwarder.  A forwarded packet is never forwarded again, but for those that
came for a client that had just left: they follow it, once for each time that it moves.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView
from typing import TYPE_CHECKING, Final, Protocol

from ..wire import frames
from ..wire.frames import PeerGoneReason
from .counters import Counters, DropReason
from .moves import Moves
from .runs import KEYED
from .siblings import Node

if TYPE_CHECKING:
    from .session import Session

__all__ = ["Forwarder", "Router"]

_MOST_NEWS: Final = 1000  # that may wait


class Forwarder(Protocol):
    """A mesh peer through which packets can leave."""

    def forward(self, src: bytes, dst: bytes, chunk: bytes) -> None:
        """Send the packets of a run of RECV_PACKET frames from `src` onwards to `dst`.

        It counts each as forwarded when it leaves, or as dropped.
        """


class _Duplicates:
    """The sessions that share one key (derpserver, dupClientSet)."""

    __slots__ = ("active", "heirs", "sessions")

    def __init__(self, first: Session, second: Session) -> None:
        self.sessions: set[Session] = {first, second}
        self.active = second  # who connected or spoke last
        # Who takes over, the next one at the end; a dict because it keeps the order.  As with stock derper, the
        # second session is not in it before it speaks, but later ones are.
        self.heirs: dict[Session, None] = {first: None}

    def add(self, session: Session) -> None:
        self.sessions.add(session)
        self.note(session)

    def note(self, session: Session) -> None:
        if self.active is not session or session not in self.heirs:
            self.active = session
            self.heirs.pop(session, None)
            self.heirs[session] = None

    def remove(self, session: Session) -> None:
        self.sessions.discard(session)
        self.heirs.pop(session, None)
        if self.active is session:
            heir = next(reversed(self.heirs), None)
            self.active = next(iter(self.sessions)) if heir is None else heir


class Router:
    """The routing table of one relay, or of its worker with this number.  `public_key` is the relay's own."""

    def __init__(self, public_key: bytes, counters: Counters, number: int = 0) -> None:
        self.public_key = public_key
        self.counters = counters
        #: key -> active session.  The hot path reads it directly.
        self.active: dict[bytes, Session] = {}
        #: key -> mesh peers that lead to it, the preferred one first.  The hot path reads it directly.
        self.forwarders: dict[bytes, tuple[Forwarder, ...]] = {}
        self.watchers: set[Session] = set()
        self.moves = Moves(counters)
        self.draining = False  # who leaves now moves to another node
        self.waits = False  # who leaves is expected back, here or at another node
        self.node = Node(self, number)
        self.elsewhere = self.node.elsewhere
        #: Called when there is news for the watchers.  Whoever replaces it may collect more, but calls `tell` soon.
        self.has_news: Callable[[], None] = self.tell
        self._news: list[bytes] = []
        self._duplicates: dict[bytes, _Duplicates] = {}
        self._interested: dict[bytes, set[Session]] = {}

    # -- local clients ------------------------------------------------------------------------------

    def register(self, session: Session) -> None:
        """`session` has logged in and may receive packets."""
        key = session.key
        previous = self.here(key)
        if previous is not None:
            self._register_duplicate(previous, session)
        self.active[key] = session
        self.node.arrived(session)
        self.counters.current_connections += 1
        if session.not_ideal:
            self.counters.current_notideal_connections += 1
        self.broadcast(session.present_frame())

    def catch_up(self, session: Session) -> None:
        """Send what waited for a client that has come back; its login must have been answered."""
        for held in self.moves.found(session.key):
            session.deliver(held.source, held.frame, 1, session.connected_at)

    def unregister(self, session: Session) -> None:
        """`session` is closed: forget it, and tell those who care if it was the last one with its key."""
        key = session.key
        self.watchers.discard(session)  # nothing is written to the one who left, not even of itself
        for source in session.sources:
            self._lose_interest(source, session)
        session.sources.clear()
        duplicates = self._duplicates.get(key)
        if duplicates is not None:
            self._unregister_duplicate(duplicates, session)
        else:
            self.active.pop(key, None)
            if not self.node.left(key):
                self.left_node(key)
        self.counters.current_connections -= 1
        if session.preferred:
            self.counters.current_home_connections -= 1
        if session.not_ideal:
            self.counters.current_notideal_connections -= 1

    def left_node(self, key: bytes) -> None:
        """No worker of this node has a session with this key any more: tell those who care."""
        if key not in self.forwarders:
            if self.draining or self.waits:
                self.moves.left(key, here=True)
            self._gone_from_region(key)
        self.broadcast(frames.peer_gone(key, PeerGoneReason.DISCONNECTED))
        self.counters.peer_gone_disconnected_frames += len(self.watchers)

    def note_activity(self, session: Session) -> None:
        """A session that shares its key spoke: it becomes the active one (lastWriterIsActive)."""
        duplicates = self._duplicates.get(session.key)
        if duplicates is not None:
            duplicates.note(session)
        if session.key in self.node.shadowed:
            self.node.spoke(session)
        elif duplicates is not None:
            self.active[session.key] = session

    def here(self, key: bytes) -> Session | None:
        """The session with this key that packets go to, as far as this worker has any."""
        return self.active.get(key) or self.node.shadowed.get(key)

    def sessions_of(self, key: bytes) -> tuple[Session, ...]:
        """All sessions with this key, here."""
        duplicates = self._duplicates.get(key)
        if duplicates is not None:
            return tuple(duplicates.sessions)
        session = self.here(key)
        return () if session is None else (session,)

    def sessions(self) -> list[Session]:
        """All sessions of all clients, here."""
        return [session for key in (*self.active, *self.node.shadowed) for session in self.sessions_of(key)]

    def close_peer(self, key: bytes) -> None:
        """Close all connections with this key."""
        self.end_sessions(key)
        self.node.close_peer(key)

    def end_sessions(self, key: bytes) -> None:
        """The same, here."""
        for session in self.sessions_of(key):
            session.sink.end()

    @property
    def duplicate_keys(self) -> int:
        """How many keys are connected more than once.  Of several workers the one with the active session counts it."""
        return sum(key in self.active for key in self._shared())

    @property
    def duplicate_connections(self) -> int:
        """How many sessions share their key with another."""
        return sum(len(self.sessions_of(key)) for key in self._shared())

    def _shared(self) -> set[bytes]:
        return self._duplicates.keys() | self.node.shared

    def _register_duplicate(self, previous: Session, session: Session) -> None:
        duplicates = self._duplicates.get(session.key)
        if duplicates is None:
            self._duplicates[session.key] = _Duplicates(previous, session)
            previous.is_duplicate = True
        else:
            duplicates.add(session)
        session.is_duplicate = True
        self.counters.total_dup_client_conns += 1

    def _unregister_duplicate(self, duplicates: _Duplicates, session: Session) -> None:
        key = session.key
        duplicates.remove(session)
        table = self.node.shadowed if key in self.node.shadowed else self.active
        table[key] = duplicates.active
        if len(duplicates.sessions) == 1:
            del self._duplicates[key]
            duplicates.active.is_duplicate = key in self.node.shared

    # -- the mesh ------------------------------------------------------------------------------------

    def watch(self, session: Session) -> None:
        """A mesh peer wants to know every client: tell it of this node's, and of all changes to come."""
        if session.key == self.public_key:
            return  # the relay dialed itself
        self.tell()  # those who watch already, of what the new one is told as a part of all
        present = [client.present_frame() for client in self.active.values()]
        present += [client.frame for client in self.elsewhere.values()]
        session.control(b"".join(present))
        self._count_update(len(present))
        self.watchers.add(session)

    def add_forwarder(self, key: bytes, forwarder: Forwarder) -> None:
        """The client `key` is connected to the relay behind `forwarder`."""
        known = self.forwarders.get(key, ())
        if forwarder in known:
            return
        if len(known) == 1:
            self.counters.multiforwarder_created += 1
        self.forwarders[key] = (*known, forwarder)
        for held in self.moves.found(key):
            forwarder.forward(held.source, key, held.frame)

    def remove_forwarder(self, key: bytes, forwarder: Forwarder) -> None:
        """The client `key` left the relay behind `forwarder`."""
        known = self.forwarders.get(key, ())
        rest = tuple(other for other in known if other is not forwarder)
        if len(rest) == len(known):
            # For stock derper a client that is here, and nowhere else, has one forwarder: none.
            if len(known) == 1 or (not known and self.has(key)):
                self.counters.packet_forwarder_delete_other_value += 1
        elif rest:
            self.forwarders[key] = rest
            if len(rest) == 1:
                self.counters.multiforwarder_deleted += 1
        else:
            del self.forwarders[key]
            if not self.has(key):
                self.moves.left(key)
                self._gone_from_region(key)

    def hold(self, source: bytes, dst: bytes, run: bytes) -> bool:
        """Keep a run for a client that is nowhere now but may soon be somewhere; false if there is none such."""
        if self.node.siblings:
            self.moves.expect(dst)  # their news come a little later than their clients' first packets
        return self.moves.hold(source, dst, run)

    def give_up(self, now: float) -> None:
        """Drop what waits for clients that left long enough ago.  Call it each 0.1 s."""
        for dst, held in self.moves.turn():
            packet, sender = held.frame[KEYED:], self.here(held.source)
            if sender is not None:
                sender.undeliverable(dst, packet, DropReason.UNKNOWN_DEST, now)
            else:
                self.counters.drop(DropReason.UNKNOWN_DEST_ON_FWD, frames.is_disco(packet), len(packet))

    @property
    def clients_total(self) -> int:
        """How many client keys the region has, as far as this relay knows."""
        here = self.active.keys() | self.elsewhere.keys()
        return len(here) + len(self.forwarders) - len(here & self.forwarders.keys())

    def has(self, key: bytes) -> bool:
        """Whether a client of this node has this key."""
        return key in self.active or key in self.elsewhere

    def leads_to(self, key: bytes) -> bool:
        """Whether a packet for this key could be sent on now."""
        return self.has(key) or key in self.forwarders

    # -- who is told ---------------------------------------------------------------------------------

    def note_source(self, session: Session, source: bytes) -> None:
        """`session` is about to get a packet from `source`: tell it when that one leaves the region."""
        if session.sources:
            session.sources.add(source)
        else:
            session.sources = {source}
        self._interested.setdefault(source, set()).add(session)

    def interested(self) -> ItemsView[bytes, set[Session]]:
        """Keys, and the sessions that are told when they leave."""
        return self._interested.items()

    def _lose_interest(self, source: bytes, session: Session) -> None:
        interested = self._interested[source]
        interested.discard(session)
        if not interested:
            del self._interested[source]

    def _gone_from_region(self, key: bytes) -> None:
        for session in self._interested.pop(key, ()):
            session.sources.discard(key)
            session.peer_gone(key, PeerGoneReason.DISCONNECTED)

    def broadcast(self, frame: bytes) -> None:
        """News for all watchers."""
        if not self.watchers:
            return
        self._news.append(frame)
        if len(self._news) == 1:
            self.has_news()
        elif len(self._news) >= _MOST_NEWS:
            self.tell()

    def tell(self) -> None:
        """Tell all watchers what is new, in one write each."""
        news, self._news = self._news, []
        if news:
            frames_of_all = b"".join(news)
            for watcher in self.watchers:
                watcher.control(frames_of_all)
                self._count_update(len(news))

    def _count_update(self, changes: int) -> None:
        """A watcher was told of so many changes at once."""
        self.counters.mesh_update_batch_size.observe(changes)
        self.counters.mesh_update_loop_count.observe(1)
