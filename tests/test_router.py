"""The router, alone: a simulated server, and a model of who must get what."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import perf_counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from eventbus._index import Index
from eventbus._patterns import Pattern, covers, tokenize
from eventbus._router import Command, Router, Subscription, wanted

S = Subscription


def patterns(*texts: str) -> list[Pattern]:
    """These texts, parsed."""
    return [Pattern(text) for text in texts]


def glob(name: str) -> Subscription:
    """A PSUBSCRIBE."""
    return Subscription(True, name.encode())


def literal(name: str) -> Subscription:
    """A SUBSCRIBE."""
    return Subscription(False, name.encode())


def sub(*names: Subscription) -> list[Command]:
    """Commands that subscribe to these."""
    return [Command(True, name) for name in names]


def unsub(*names: Subscription) -> list[Command]:
    """Commands that end these."""
    return [Command(False, name) for name in names]


def routes_of(router: Router[str], carrier: Subscription, channel: str) -> list[str]:
    """Who gets a frame that came this way."""
    return [match.route for match in router.resolve(carrier, channel.encode())[0]]


# -- The simulated server ------------------------------------------------------------------------


def redis_matches(subscription: Subscription, channel: str) -> bool:
    """What Redis does, said again by `re` for the few globs of this file."""
    if not subscription.pattern:
        return subscription.name.decode() == channel
    spelled = re.sub(
        r"\\(.)|(\*)|(\?)|(\[[^\]]*\])|(.)",
        lambda found: (
            ".*"
            if found[2]
            else "."
            if found[3]
            else found[4]
            if found[4]
            else re.escape(found[1] or found[5])
        ),
        subscription.name.decode(),
    )
    return re.fullmatch(spelled, channel) is not None


Answer = tuple[str, Subscription]
Copy = tuple[Subscription, str, int]
Fence = Callable[[], None]


class FakeServer:
    """Executes commands in order; what it answers and the copies that it emits form one stream."""

    def __init__(self) -> None:
        self.commands: deque[Command | Fence] = deque()
        self.stream: deque[Answer | Copy | Fence] = deque()
        self.subscribed: dict[Subscription, None] = {}
        self.denied: set[Subscription] = set()

    def execute(self) -> None:
        item = self.commands.popleft()
        if not isinstance(item, Command):
            self.stream.append(item)
        elif not item.subscribe:
            self.subscribed.pop(item.subscription, None)
            self.stream.append(("ended", item.subscription))
        elif item.subscription in self.denied:
            self.stream.append(("refused", item.subscription))
        else:
            self.subscribed[item.subscription] = None
            self.stream.append(("confirmed", item.subscription))

    def publish(self, channel: str, number: int, shuffle: random.Random) -> int:
        copies = [item for item in self.subscribed if redis_matches(item, channel)]
        shuffle.shuffle(copies)
        self.stream.extend((item, channel, number) for item in copies)
        return len(copies)

    def lose(self) -> list[Fence]:
        """The connection is gone, and all that was under way; fences are reached by that."""
        fences = [item for item in (*self.stream, *self.commands) if callable(item)]
        self.commands.clear()
        self.stream.clear()
        self.subscribed.clear()
        return fences


# -- The model -----------------------------------------------------------------------------------

POOL = (
    "a* *b *c* a*b a?b ab* * ** ?* *?* a b ab abc a:b \\* \\a [ab]* [ab]?b a:* a:{x} {x}:b {x} a{x}"
    " {p:path} a:{p:path} *:b *{x}b __* __a _* b* *a c"
).split()
CROWD = "a* *b *c* ab* * ** a*b ab abc abc* ?*".split()
RIVALS = "*a* *b* *c* a* *c a*c abc ab *bc".split()
CHANNELS = "a b c ab cb abc acb bab cab aab a:b a:a:b b:b *b * __a __ab".split()

some_patterns = st.lists(st.sampled_from(POOL), min_size=1, max_size=3, unique=True)
steps = st.integers(1, 6)


class Model:
    """Users, the world, and what each route must get; the receiver and transport around a
    router."""

    def __init__(self) -> None:
        self.router: Router[int] = Router()
        self.server = FakeServer()
        self.up = True
        self.reopened = False
        self.number = self.delivered = self.routes = 0
        self.mine: dict[int, list[Pattern]] = {}
        self.removing: dict[int, list[Pattern]] = {}
        self.got: dict[int, list[int]] = {}
        self.due: dict[int, set[int]] = {}
        self.unread: Counter[int] = Counter()
        self.counted: set[int] = set()

    # -- What the receiver and the transport do

    def send(self, commands: list[Command]) -> None:
        if self.up:
            self.server.commands += commands

    def after(self, commands: list[Command]) -> None:
        self.send(commands)
        if self.reopened and not self.router.asking():
            self.reopened = False
            self.send(self.router.retry_denied())

    def take(self, carrier: Subscription, channel: str, number: int) -> None:
        matches, counts = self.router.resolve(carrier, channel.encode())
        if counts:
            assert number not in self.counted, "a message was counted twice"
            self.counted.add(number)
        for match in matches:
            got = self.got[match.route]
            assert not got or got[-1] < number, "a message came twice, or out of order"
            assert match.pattern in self.mine[match.route]
            assert match.captures == match.pattern.match(channel.encode())
            got.append(number)
            self.delivered += 1
        self.unread[number] -= 1
        if not self.unread[number]:
            del self.unread[number]
            assert number in self.counted, "nobody counted a message"
            for route, due in self.due.items():
                if number in due:
                    due.discard(number)
                    assert self.got[route][-1:] == [number], "a message was lost"

    # -- What users do, between any two bytes

    def attach(self, texts: list[str]) -> int:
        self.routes += 1
        route = self.routes
        self.mine[route], self.removing[route] = patterns(*texts), []
        self.got[route], self.due[route] = [], set()
        self.send(self.router.add(route, self.mine[route]))
        return route

    def add(self, route: int, texts: list[str]) -> None:
        fresh = [item for item in patterns(*texts) if item not in self.mine[route]]
        self.mine[route] += fresh
        self.send(self.router.add(route, fresh))

    def discard(self, route: int, chosen: list[Pattern]) -> None:
        """Some of a route's patterns, at a fence."""
        self.removing[route] += chosen

        def switch() -> None:
            if route in self.mine:
                known = [item for item in chosen if item in self.mine[route]]
                self.mine[route] = [item for item in self.mine[route] if item not in known]
                for item in chosen:
                    self.removing[route].remove(item)
                self.send(self.router.remove(route, known))

        if self.up:
            self.server.commands.append(switch)
        else:
            switch()

    def detach(self, route: int) -> None:
        """The whole route, at once."""
        known = self.mine.pop(route)
        del self.due[route], self.removing[route]
        self.send(self.router.remove(route, known))

    def publish(self, channel: str, seed: int = 0) -> None:
        self.number += 1
        for route, mine in self.mine.items():
            if any(
                self.is_confirmed(pattern) and hears(pattern, channel)
                for pattern in mine
                if pattern not in self.removing[route]
            ):
                self.due[route].add(self.number)
        copies = self.server.publish(channel, self.number, random.Random(seed))
        if copies:
            self.unread[self.number] = copies
        else:
            assert not any(self.number in due for due in self.due.values()), "nothing carries it"

    def is_confirmed(self, pattern: Pattern) -> bool:
        item = wanted(pattern)
        return self.router.is_settled(item) and not self.router.is_denied(item)

    def retry(self) -> None:
        """A clock may ask for that at any moment."""
        self.send(self.router.retry_denied())

    # -- What the world does

    def execute(self, count: int) -> None:
        for _ in range(min(count, len(self.server.commands))):
            self.server.execute()

    def read(self, count: int) -> None:
        """Take some things from the stream."""
        for _ in range(min(count, len(self.server.stream))):
            item = self.server.stream.popleft()
            if callable(item):
                item()
            elif len(item) == 3:
                self.take(*item)
            else:
                self.after(getattr(self.router, item[0])(item[1]))

    def deny(self, text: str) -> None:
        """Redis cuts off who is subscribed to what is taken away; so only what is not."""
        item = wanted(Pattern(text))
        if item not in self.server.subscribed:
            self.server.denied.add(item)

    def lose(self) -> None:
        self.up = self.reopened = False
        self.unread.clear()
        for due in self.due.values():
            due.clear()
        fences = self.server.lose()
        self.router.lost()
        for fence in fences:
            fence()

    def reconnect(self) -> None:
        self.up = self.reopened = True
        self.after(self.router.restart())

    # -- What must be true

    def check_always(self) -> None:
        assert set(self.router.live) >= set(self.router._carrier.values())
        assert self.router.asking() == bool(self.router._asked)

    def settle(self) -> None:
        """At rest the plan is smallest, all that is wanted is carried, and nothing is left over."""
        if not self.up:
            self.reconnect()
        for _ in range(1000):
            self.execute(1000)
            self.read(1000)
        assert not self.server.commands and not self.server.stream, "it never comes to rest"
        router = self.router
        wants = {wanted(pattern) for mine in self.mine.values() for pattern in mine}
        spared = {router._carrier[item] for item in router.denied if item in router._carrier}
        live = router.live.keys() - (spared - wants)
        assert router.live.keys() == self.server.subscribed.keys()
        assert live <= wants
        for one in live:
            assert not any(covered(one, by=other) for other in live if other != one)
        for one in wants:
            covering = [other for other in live if covered(one, by=other)]
            assert router.is_settled(one)
            assert (one in router.denied) == (not covering)
            assert router.is_denied(one) == (one not in router._carrier)
            if covering:
                assert router._cover[one] in covering
                assert router._carrier[one] in {*covering, *spared}
        assert not any(self.due.values())
        assert not self.unread
        assert not (router._asked or router._leaving or router._heirs or router._relied)
        assert router._surplus == router.live.keys() - live
        assert router._entries.keys() == wants
        assert router._shapes.keys() == wants | router.live.keys()
        assert router._targets.keys() == live
        assert {target for _, target in router._target_index._starts} == live
        assert router._cover.keys() | router.denied.keys() == wants
        assert not router._cover.keys() & router.denied.keys()
        assert pairs(router._targets) == set(router._cover.items())
        assert pairs(router._carried) == set(router._carrier.items())

    def finish(self) -> None:
        """When all routes are gone, so is everything that was kept for them."""
        self.settle()
        for route in list(self.mine):
            self.detach(route)
        self.settle()
        for name, value in vars(self.router).items():
            if name not in ("version", "_moment", "_order"):
                kept = vars(value).values() if isinstance(value, Index) else [value]
                assert not any(kept), f"{name} keeps something"


def hears(pattern: Pattern, channel: str) -> bool:
    """Whether a route with this pattern is to get what is published there."""
    hidden = channel.startswith("__") and not pattern.prefix.startswith(b"__")
    return not hidden and pattern.match(channel.encode()) is not None


def pairs(table: dict[Subscription, set[Subscription]]) -> set[tuple[Subscription, Subscription]]:
    """The table read the other way round."""
    return {(member, key) for key, members in table.items() for member in members}


def covered(one: Subscription, *, by: Subscription) -> bool:
    """Whether all that `one` matches is matched by the other."""
    return covers(tokens_of(by), tokens_of(one))


def tokens_of(subscription: Subscription) -> tuple[int, ...]:
    """The tokens of a literal, or of a glob."""
    if subscription.pattern:
        return tokenize(subscription.name)
    return tuple(1 << byte for byte in subscription.name)


class Plan(RuleBasedStateMachine):
    """The model, with hypothesis for a user and a world."""

    routes: Bundle[int] = Bundle("routes")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()

    @rule(target=routes, texts=some_patterns)
    def attach(self, texts: list[str]) -> int:
        return self.model.attach(texts)

    @rule(route=routes, texts=some_patterns)
    def add(self, route: int, texts: list[str]) -> None:
        self.model.add(route, texts)

    @rule(route=routes, which=st.lists(st.integers(0, 5), min_size=1, max_size=3))
    def discard(self, route: int, which: list[int]) -> None:
        mine = self.model.mine[route]
        self.model.discard(route, [mine[i] for i in set(which) if i < len(mine)])

    @rule(route=consumes(routes))
    def detach(self, route: int) -> None:
        self.model.detach(route)

    @rule(channel=st.sampled_from(CHANNELS), seed=st.integers(0, 9))
    def publish(self, channel: str, seed: int) -> None:
        self.model.publish(channel, seed)

    @rule(count=steps)
    def execute(self, count: int) -> None:
        self.model.execute(count)

    @rule(count=steps)
    def read(self, count: int) -> None:
        self.model.read(count)

    @rule(text=st.sampled_from(POOL))
    def deny(self, text: str) -> None:
        self.model.deny(text)

    @rule()
    def grant(self) -> None:
        self.model.server.denied.clear()

    @rule()
    def retry(self) -> None:
        self.model.retry()

    @precondition(lambda self: self.model.up)
    @rule()
    def lose(self) -> None:
        self.model.lose()

    @precondition(lambda self: not self.model.up)
    @rule()
    def reconnect(self) -> None:
        self.model.reconnect()

    @rule()
    def settle(self) -> None:
        self.model.settle()

    @invariant()
    def check(self) -> None:
        self.model.check_always()

    def teardown(self) -> None:
        self.model.finish()


def walk(seed: int, length: int) -> Model:
    """A long random walk: the same model without hypothesis, for depth."""
    draw, model = random.Random(seed), Model()
    crowd = draw.choice([POOL, CROWD, RIVALS])
    pool = draw.sample(crowd, draw.randint(3, 9))
    channels = draw.sample(CHANNELS, 3) + ["ab", "abc"]

    def some() -> list[str]:
        return draw.sample(pool, draw.randint(1, 3))

    actions: list[tuple[int, Callable[[], object]]] = [
        (3, lambda: model.attach(some())),
        (2, lambda: model.mine and model.add(draw.choice(list(model.mine)), some())),
        (2, lambda: model.mine and discard(draw.choice(list(model.mine)))),
        (3, lambda: model.mine and model.detach(draw.choice(list(model.mine)))),
        (9, lambda: model.publish(draw.choice(channels), draw.randint(0, 9))),
        (8, lambda: model.execute(draw.randint(1, 3))),
        (14, lambda: model.read(draw.randint(1, 3))),
        (1, lambda: model.deny(draw.choice(pool))),
        (0.3, model.server.denied.clear),
        (0.3, model.retry),
        (0.3, lambda: model.lose() if model.up else model.reconnect()),
        (0.7, lambda: None if model.up else model.reconnect()),
        (0.2, model.settle),
    ]

    def discard(route: int) -> None:
        mine = model.mine[route]
        model.discard(route, draw.sample(mine, draw.randint(0, len(mine))))

    weights = [weight for weight, _ in actions]
    for _, action in draw.choices(actions, weights, k=length):
        action()
        model.check_always()
    model.finish()
    return model


def test_every_message_reaches_every_route_once_and_in_order() -> None:
    """Whatever comes and goes between any two bytes, no route misses or repeats a message."""
    run_state_machine_as_test(
        Plan,
        settings=settings(
            max_examples=int(__import__("os").environ.get("N", "300")),
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
