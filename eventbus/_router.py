"""Routing: who listens to what, what the server must be asked for, and who gets a frame.

Theory of operation. Each route has patterns; each pattern is wanted as a *subscription* (SUBSCRIBE
for a literal, PSUBSCRIBE for a glob). The *targets* are the smallest set of wanted subscriptions in
which none covers another, so that a message crosses the wire once. Each wanted subscription has a
`cover` (the target that should carry it) and a `carrier` (the live one that does).

Carriers change only at points of the stream where the server itself changed: when a subscription is
confirmed, or has ended. Between two such points every copy of a message meets the same carriers, so
nothing is delivered twice or lost while the set changes. A subscription is let go only when all
that it carries has a live cover; these `heirs` take over when it has ended. (So one that carries
what the server denies by itself is kept.)

Pure: every method changes the state and returns the commands to send; the caller does the I/O.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from eventbus._index import Index, Shape, glob_shape, name_shape
from eventbus._patterns import Pattern

PROBE_PREFIX = b"__eventbus__:"
"""Channels that begin so, alone or after a namespace, are of the buses themselves: no messages."""


class Subscription(NamedTuple):
    """What the server is asked for: `pattern` says PSUBSCRIBE, `name` is without the namespace."""

    pattern: bool
    name: bytes


class Command(NamedTuple):
    """One thing to send: subscribe or unsubscribe."""

    subscribe: bool
    subscription: Subscription


R = TypeVar("R", bound=Hashable)


class Match(NamedTuple, Generic[R]):
    """One route that a frame goes to, with the pattern that chose it and its captures."""

    route: R
    pattern: Pattern
    captures: dict[str, str]


def wanted(pattern: Pattern) -> Subscription:
    """The subscription that a pattern asks for by itself."""
    if pattern.literal is not None:
        return Subscription(False, pattern.literal)
    return Subscription(True, pattern.wire)


class _Entry(NamedTuple, Generic[R]):
    """One pattern of one route. `order` grows with every pattern that is added."""

    route: R
    pattern: Pattern
    order: int


class Router(Generic[R]):
    """The routes, and the state of the subscriptions that serve them."""

    def __init__(self) -> None:
        self.version = 0
        """Grows whenever `resolve` may answer differently than before."""
        self.live: dict[Subscription, int] = {}
        """Confirmed subscriptions, with the moment (a count) of their confirmation."""
        self.denied: dict[Subscription, None] = {}
        self._entries: dict[Subscription, list[_Entry[R]]] = {}
        self._order = 0
        self._shapes: dict[Subscription, Shape] = {}
        self._wanted: Index[Subscription] = Index()
        self._confirmed: Index[Subscription] = Index()
        self._targets: dict[Subscription, set[Subscription]] = {}
        self._target_index: Index[Subscription] = Index()
        self._cover: dict[Subscription, Subscription] = {}
        self._carrier: dict[Subscription, Subscription] = {}
        self._carried: dict[Subscription, set[Subscription]] = {}
        self._heirs: dict[Subscription, dict[Subscription, Subscription]] = {}
        self._relied: dict[Subscription, int] = {}
        self._asked: set[Subscription] = set()
        self._leaving: set[Subscription] = set()
        self._surplus: set[Subscription] = set()  # live and not leaving, but no target (any more)
        self._moment = 0

    # -- Routes ----------------------------------------------------------------------------------

    def add(self, route: R, patterns: Iterable[Pattern]) -> list[Command]:
        """A route listens to these patterns too. Returns what to send."""
        fresh: list[Subscription] = []
        for pattern in patterns:
            self._order += 1
            subscription = wanted(pattern)
            entries = self._entries.get(subscription)
            if entries is None:
                entries = self._entries[subscription] = []
                self._wanted.add(subscription, self._shape_of(subscription))
                fresh.append(subscription)
            entries.append(_Entry(route, pattern, self._order))
        self.version += 1
        return [*self._place(fresh, fresh=True), *self._let_go()]

    def remove(self, route: R, patterns: Iterable[Pattern]) -> list[Command]:
        """A route no longer listens to these patterns. Returns what to send.

        For a route that keeps other patterns this must happen at a point of the stream (a fence),
        since its other patterns then answer for channels that these answered for.
        """
        gone: list[Subscription] = []
        for pattern in patterns:
            subscription = wanted(pattern)
            entries = self._entries.get(subscription, [])
            entries[:] = [
                entry for entry in entries if (entry.route, entry.pattern) != (route, pattern)
            ]
            if not entries and self._entries.pop(subscription, None) is not None:
                self._wanted.remove(subscription, self._shapes[subscription])
                gone.append(subscription)
        self.version += 1
        return self._unwant(gone)

    def is_settled(self, subscription: Subscription) -> bool:
        """Whether the server has confirmed or denied what carries this (or nobody wants it)."""
        if subscription not in self._entries:
            return True
        return subscription in self._carrier or subscription in self.denied

    def is_denied(self, subscription: Subscription) -> bool:
        """Whether the server refuses this subscription, and nothing else carries it."""
        return subscription in self.denied and subscription not in self._carrier

    def asking(self) -> bool:
        """Whether an answer of the server is still awaited."""
        return bool(self._asked)

    # -- What the server did -----------------------------------------------------------------------

    def confirmed(self, subscription: Subscription) -> list[Command]:
        """The server confirmed a subscription: it carries from here on what it is to cover."""
        self._asked.discard(subscription)
        self._moment += 1
        if subscription not in self.live:
            self._confirmed.add(subscription, self._shape_of(subscription))
        self.live[subscription] = self._moment
        self.version += 1
        if subscription in self._targets:
            for item in self._adoptable(subscription):
                del self.denied[item]
                self._targets[subscription].add(item)
                self._cover[item] = subscription
        else:
            self._surplus.add(subscription)
        for member in self._targets.get(subscription, ()):
            if self._carrier.get(member) != subscription:
                self._carry(member, subscription)
        return self._let_go()

    def refused(self, subscription: Subscription) -> list[Command]:
        """The server denied a subscription: what it was to cover is asked for by itself."""
        self._asked.discard(subscription)
        if subscription not in self._targets:  # nobody wants it now, or another is to cover it
            self._forget_shape(subscription)
            return self._let_go()
        self.denied[subscription] = None
        members = self._unset_target(subscription)
        del self._cover[subscription]
        members.discard(subscription)
        return [*self._place(members), *self._let_go()]

    def ended(self, subscription: Subscription) -> list[Command]:
        """The server confirmed the end of a subscription: the heirs carry on from here."""
        self._leaving.discard(subscription)
        self._surplus.discard(subscription)
        if self.live.pop(subscription, None) is not None:
            self._confirmed.remove(subscription, self._shapes[subscription])
        self.version += 1
        heirs = self._heirs.pop(subscription, {})
        for member in list(self._carried.get(subscription, ())):
            heir = heirs.get(member, self._cover.get(member))
            if heir is not None and heir in self.live:
                self._carry(member, heir)
            else:
                self._drop_carrier(member)
        for heir in heirs.values():
            self._relied[heir] -= 1
            if not self._relied[heir]:
                del self._relied[heir]
        self._forget_shape(subscription)
        return self._let_go()

    def lost(self) -> None:
        """The connection is gone, and with it every subscription."""
        self.live.clear()
        self._confirmed = Index()
        self._carrier.clear()
        self._carried.clear()
        self._heirs.clear()
        self._relied.clear()
        self._asked.clear()
        self._leaving.clear()
        self._surplus.clear()
        self.version += 1

    def restart(self) -> list[Command]:
        """All that a new connection must be asked for. What was denied comes after the rest is
        settled, by `retry_denied`, so that it delays nobody."""
        self._asked = set(self._targets)
        self._shapes = {item: self._shapes[item] for item in self._entries}
        return [Command(True, subscription) for subscription in self._targets]

    def retry_denied(self) -> list[Command]:
        """Ask again for what was denied. Nothing that is live changes until the answer."""
        denied, self.denied = self.denied, {}
        return [*self._place(denied), *self._let_go()]

    # -- Frames ----------------------------------------------------------------------------------

    def resolve(self, carrier: Subscription, channel: bytes) -> tuple[list[Match[R]], bool]:
        """The routes that get a frame of this channel that came through this subscription, and
        whether this copy is the one that counts (the first of several on the wire)."""
        hidden = 0 if channel.startswith(b"__") else channel.find(PROBE_PREFIX)
        best: dict[R, tuple[int, Subscription, Match[R]]] = {}
        for subscription in self._wanted.above(channel, channel, channel):
            through = self._carrier.get(subscription)
            if through is None:
                continue
            for route, pattern, order in self._entries[subscription]:
                if hidden >= 0 and not pattern.prefix.startswith(b"__", hidden):
                    continue
                known = best.get(route)
                if known is not None and known[0] < order:
                    continue
                captures = pattern.match(channel)
                if captures is not None:
                    best[route] = (order, through, Match(route, pattern, captures))
        matches = [match for _, through, match in best.values() if through == carrier]
        return matches, self._first_copy(channel) in (None, carrier)

    def _first_copy(self, channel: bytes) -> Subscription | None:
        """Of the live subscriptions that match a channel, the one confirmed first."""
        first = None
        for subscription in self._confirmed.above(channel, channel, channel):
            is_older = first is None or self.live[subscription] < self.live[first]
            if is_older and self._shapes[subscription].matches(channel):
                first = subscription
        return first

    def hears(self, channel: bytes) -> bool:
        """Whether any live subscription matches this channel."""
        return self._first_copy(channel) is not None

    # -- The plan ----------------------------------------------------------------------------------

    def _shape_of(self, subscription: Subscription) -> Shape:
        shape = self._shapes.get(subscription)
        if shape is None:
            shape = (
                glob_shape(subscription.name)
                if subscription.pattern
                else name_shape(subscription.name)
            )
            self._shapes[subscription] = shape
        return shape

    def _forget_shape(self, subscription: Subscription) -> None:
        used = (self._entries, self.live, self._asked, self._leaving)
        if not any(subscription in place for place in used):
            self._shapes.pop(subscription, None)

    def _covering(self, subscription: Subscription) -> Subscription | None:
        """The target that covers a subscription which is none itself, if one does."""
        shape = self._shape_of(subscription)
        for target in self._target_index.above(shape.start, shape.end, shape.hay):
            if self._shapes[target].covers(shape):
                return target
        return None

    def _set_target(self, subscription: Subscription) -> list[Subscription]:
        """Make this a target, instead of those that it covers. Returns their members."""
        shape = self._shape_of(subscription)
        found: list[Subscription] = []
        for target in self._target_index.below(shape):
            if shape.covers(self._shapes[target]):
                found += self._unset_target(target)
        self._surplus.discard(subscription)
        self._targets[subscription] = set()
        self._target_index.add(subscription, shape)
        return found

    def _unset_target(self, subscription: Subscription) -> set[Subscription]:
        self._target_index.remove(subscription, self._shapes[subscription])
        if self._is_steady(subscription):
            self._surplus.add(subscription)
        return self._targets.pop(subscription)

    def _place(
        self, subscriptions: Iterable[Subscription], *, fresh: bool = False
    ) -> list[Command]:
        """Find a cover for each of these, the likely coverers first.

        What is fresh is carried at once when its cover is live: it comes last in its route's order,
        so it takes no message from another pattern. All else must wait for a point of the stream: a
        live cover is asked for again, only for its confirmation.
        """
        commands: list[Command] = []
        for subscription in sorted(subscriptions, key=lambda item: (len(item.name), item)):
            target = self._covering(subscription)
            placed, ready = [subscription], True
            if target is None:
                target, ready = subscription, not self._adoptable(subscription)
                placed += self._set_target(subscription)
            self._targets[target].update(placed)
            self._cover.update(dict.fromkeys(placed, target))
            if fresh and self._is_steady(target):
                self._carry(subscription, target)
            ready &= self._is_steady(target) and all(item in self._carrier for item in placed)
            if not ready and target not in self._asked:
                self._asked.add(target)
                commands.append(Command(True, target))
        return commands

    def _adoptable(self, target: Subscription) -> list[Subscription]:
        """What is denied by itself, and can be had through this target when it is live."""
        shape = self._shape_of(target)
        return [item for item in self.denied if shape.covers(self._shapes[item])]

    def _unwant(self, subscriptions: Iterable[Subscription]) -> list[Command]:
        """No route wants these any more."""
        homeless: dict[Subscription, None] = {}
        for subscription in subscriptions:
            self.denied.pop(subscription, None)
            self._drop_carrier(subscription)
            if subscription in self._targets:
                homeless.update(dict.fromkeys(self._unset_target(subscription)))
            target = self._cover.pop(subscription, None)
            if target is not None and target in self._targets:
                self._targets[target].discard(subscription)
            homeless.pop(subscription, None)
            self._forget_shape(subscription)
        return [*self._place(homeless), *self._let_go()]

    # -- Carriers ----------------------------------------------------------------------------------

    def _is_steady(self, subscription: Subscription | None) -> bool:
        return subscription in self.live and subscription not in self._leaving

    def _carry(self, member: Subscription, carrier: Subscription) -> None:
        self._drop_carrier(member)
        self._carrier[member] = carrier
        self._carried.setdefault(carrier, set()).add(member)
        self.version += 1

    def _drop_carrier(self, member: Subscription) -> None:
        carrier = self._carrier.pop(member, None)
        if carrier is not None:
            carried = self._carried[carrier]
            carried.discard(member)
            if not carried:
                del self._carried[carrier]

    def _let_go(self) -> list[Command]:
        """Unsubscribe from what is no target and carries nothing that has no other live place."""
        commands: list[Command] = []
        for subscription in sorted(self._surplus - self._asked - self._relied.keys()):
            members = self._carried.get(subscription, ())
            if all(self._is_steady(self._cover.get(member)) for member in members):
                self._surplus.discard(subscription)
                self._leaving.add(subscription)
                if members:
                    self._heirs[subscription] = {item: self._cover[item] for item in members}
                for heir in self._heirs.get(subscription, {}).values():
                    self._relied[heir] = self._relied.get(heir, 0) + 1
                commands.append(Command(False, subscription))
        return commands
