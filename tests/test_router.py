"""The router, alone: a simulated server, and a model of who must get what."""

from __future__ import annotations

import os
import random
import re
from collections import Counter, deque
from collections.abc import Callable
from time import perf_counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from eventbus import _index
from eventbus._index import Index
from eventbus._patterns import Pattern, covers, tokenize
from eventbus._router import Command, Router, Subscription, wanted

CAMPAIGN = int(os.environ.get("EVENTBUS_CAMPAIGN", "1"))
"""How many times the usual number of examples; more than 1 needs a longer `--timeout` too."""


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
    return sorted(match.route for match in router.resolve(carrier, channel.encode())[0])


# -- The simulated server ------------------------------------------------------------------------


def redis_matches(subscription: Subscription, channel: str) -> bool:
    """What Redis does, said again by `re` for the few globs of this file."""
    if not subscription.pattern:
        return subscription.name.decode() == channel
    spelled = re.sub(
        r"\\(.)|(\*)|(\?)|(\[[^\]]*\])|(.)",
        lambda found: (
            ".*" if found[2] else "." if found[3] else found[4] or re.escape(found[1] or found[5])
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
        self.stream += [(item, channel, number) for item in copies]
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
        self.number = self.delivered = self.switches = self.routes = 0
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
                before = dict(self.router._carrier)
                self.after(getattr(self.router, item[0])(item[1]))
                after = self.router._carrier
                self.switches += sum(after.get(key, old) != old for key, old in before.items())

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
        for _ in range(100):
            self.execute(1000)
            self.read(1000)
        assert not self.server.commands, "it never comes to rest"
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
        assert not any((router._asked, router._leaving, router._heirs, router._relied))
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
    channels = [*draw.sample(CHANNELS, 3), "ab", "abc"]

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


def test_no_message_is_missed_or_repeated_whatever_changes(say: Callable[[str], None]) -> None:
    """Whatever comes and goes between any two bytes, a confirmed route gets each message once."""
    run_state_machine_as_test(
        Plan,
        settings=settings(
            max_examples=40 * CAMPAIGN,
            stateful_step_count=50,
            suppress_health_check=list(HealthCheck),
        ),
    )
    walks = [walk(seed, 200) for seed in range(600 * CAMPAIGN)]
    switches, messages, delivered = (
        sum(getattr(model, name) for model in walks) for name in ("switches", "number", "delivered")
    )
    say(f"router, simulated: {messages} messages, {delivered} deliveries, {switches} switches")
    assert switches > messages / 100


# -- What is asked for -----------------------------------------------------------------------------


def test_a_covered_set_asks_for_one_subscription() -> None:
    """What another pattern covers is not asked for, in whatever order the patterns come."""
    router: Router[str] = Router()
    assert router.add("narrow", patterns("chat:room-1", "chat:{room}", "chat:*")) == sub(
        glob("chat:*")
    )
    assert router.add("late", patterns("chat:room-2")) == []


def test_literals_are_no_patterns() -> None:
    """A pattern with nothing to match is a SUBSCRIBE to its unescaped name."""
    router: Router[str] = Router()
    assert router.add("route", patterns("a\\*")) == sub(literal("a*"))


def test_the_server_changes_first() -> None:
    """A wider pattern takes over once it is confirmed; the narrower one is let go after that."""
    router: Router[str] = Router()
    router.add("narrow", patterns("ab"))
    router.confirmed(literal("ab"))
    assert router.add("wide", patterns("a*")) == sub(glob("a*"))
    assert routes_of(router, literal("ab"), "ab") == ["narrow"]
    assert router.confirmed(glob("a*")) == unsub(literal("ab"))
    assert routes_of(router, literal("ab"), "ab") == []
    assert routes_of(router, glob("a*"), "ab") == ["narrow", "wide"]
    assert router.ended(literal("ab")) == []
    assert routes_of(router, glob("a*"), "ab") == ["narrow", "wide"]


def test_routes_leave_in_one_step() -> None:
    """A route with patterns that cover each other leaves without asking for any of them anew."""
    router: Router[str] = Router()
    mine = patterns("a*", "ab*", "abc")
    router.add("route", mine)
    router.confirmed(glob("a*"))
    assert router.remove("route", mine) == unsub(glob("a*"))
    assert router.remove("route", mine) == []
    assert router.is_settled(literal("abc"))


def test_an_heir_waits_until_it_has_taken_over() -> None:
    """What carries on for a subscription that is leaving is kept until that has ended."""
    router: Router[str] = Router()
    for text in ("ab*", "*c"):
        router.add(text, patterns(text))
        router.confirmed(glob(text))
    assert router.add("both", patterns("abc")) == []
    assert router.remove("ab*", patterns("ab*")) == unsub(glob("ab*"))
    assert routes_of(router, glob("ab*"), "abc") == ["both"]
    assert router.remove("*c", patterns("*c")) == sub(literal("abc"))  # `*c` is the heir
    assert router.ended(glob("ab*")) == []
    assert routes_of(router, glob("*c"), "abc") == ["both"]
    assert router.confirmed(literal("abc")) == unsub(glob("*c"))


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_carried_anew_between_two_copies(seed: int) -> None:
    """A pattern that waits is not carried in the midst of a message that another pattern took."""
    model = Model()
    for text in ("*zz", "a*c", "ab*"):
        model.attach([text])
    model.settle()
    third = model.attach(["*bc"])
    route = model.attach(["abc"])
    assert model.router._cover[literal("abc")] == glob("*bc")  # which is not confirmed yet
    model.add(route, ["ab*"])
    model.publish("abc", seed)
    model.read(1)
    model.detach(third)
    assert model.router._cover[literal("abc")] == glob("a*c")  # which is live
    model.read(1)
    assert model.got[route] == [1]
    model.finish()


# -- Denied ----------------------------------------------------------------------------------------


def test_a_denied_cover_hurts_only_itself() -> None:
    """What a denied pattern was to cover goes on, or is asked for by itself."""
    router: Router[str] = Router()
    router.add("old", patterns("ab"))
    router.confirmed(literal("ab"))
    router.add("wide", patterns("a*"))
    router.add("new", patterns("ac"))
    assert router.refused(glob("a*")) == sub(literal("ac"))
    assert router.is_denied(glob("a*"))
    assert routes_of(router, literal("ab"), "ab") == ["old"]


def test_denied_but_covered_since() -> None:
    """A pattern that is refused when another is to cover it already does not count as denied."""
    router: Router[str] = Router()
    router.add("narrow", patterns("ab*"))
    router.add("wide", patterns("a*"))
    assert router.refused(glob("ab*")) == []
    assert not router.denied
    assert not router.is_settled(glob("ab*"))
    router.confirmed(glob("a*"))
    assert routes_of(router, glob("a*"), "abc") == ["narrow", "wide"]


def test_denied_and_unwanted_since() -> None:
    """The refusal of what nobody wants any more changes nothing."""
    router: Router[str] = Router()
    router.add("route", patterns("a*"))
    router.remove("route", patterns("a*"))
    assert router.refused(glob("a*")) == []
    assert not router.denied


def test_denied_but_had_through_another() -> None:
    """A denied pattern is carried by an allowed one that covers it, once that is confirmed."""
    router: Router[str] = Router()
    router.add("denied", patterns("ab*"))
    router.refused(glob("ab*"))
    router.add("wide", patterns("a*"))
    assert router.is_denied(glob("ab*"))
    router.confirmed(glob("a*"))
    assert not router.denied
    assert routes_of(router, glob("a*"), "abc") == ["denied", "wide"]


def test_refused_although_live() -> None:
    """A subscription that is live stays, whatever the server says to its being asked for again."""
    router: Router[str] = Router()
    router.add("wide", patterns("a*"))
    router.confirmed(glob("a*"))
    assert router.refused(glob("a*")) == []
    assert not router.is_denied(glob("a*"))
    assert routes_of(router, glob("a*"), "abc") == ["wide"]


def test_the_denied_are_asked_again() -> None:
    """A new connection asks for what was denied only when told to, after all else."""
    router: Router[str] = Router()
    router.add("route", patterns("a*", "b*"))
    router.refused(glob("b*"))
    router.confirmed(glob("a*"))
    router.lost()
    assert not router.hears(b"ab")
    assert router.restart() == sub(glob("a*"))
    assert router.asking()
    router.confirmed(glob("a*"))
    assert not router.asking()
    assert router.retry_denied() == sub(glob("b*"))


# -- Who gets a frame ------------------------------------------------------------------------------


def test_the_first_pattern_of_a_route_answers() -> None:
    """Of several patterns of one route, the first that matches owns the message."""
    router: Router[str] = Router()
    first, second = glob("*:b"), glob("a:*")
    router.add("route", patterns("{x}:b", "a:{y}"))
    for item in (second, first):
        router.confirmed(item)
    assert router.resolve(second, b"a:b") == ([], True)
    matches, counts = router.resolve(first, b"a:b")
    assert [(match.pattern.text, match.captures) for match in matches] == [("{x}:b", {"x": "a"})]
    assert not counts
    assert routes_of(router, second, "a:c") == ["route"]


def test_captures_are_stricter_than_the_wire() -> None:
    """A channel that only the glob of a pattern matches, and not its captures, is not for it."""
    router: Router[str] = Router()
    router.add("route", patterns("chat:{room}"))
    router.confirmed(glob("chat:*"))
    assert router.resolve(glob("chat:*"), b"chat:a:b") == ([], True)


def test_hidden_channels() -> None:
    """Channels that begin with `__` reach only patterns that begin literally with `__`."""
    router: Router[str] = Router()
    router.add("all", patterns("*"))
    router.add("hidden", patterns("__*"))
    router.confirmed(glob("*"))
    assert routes_of(router, glob("*"), "__a") == ["hidden"]
    assert routes_of(router, glob("*"), "_a") == ["all"]


def test_unknown_frames() -> None:
    """A frame that no live subscription explains is counted, and goes to nobody."""
    router: Router[str] = Router()
    router.add("route", patterns("a*"))
    assert router.resolve(glob("a*"), b"ab") == ([], True)


def test_an_end_that_was_not_asked_for() -> None:
    """When a bus lets go of all it has, what was carried is carried no more, and twice is once."""
    router: Router[str] = Router()
    router.add("route", patterns("a*", "ab"))
    router.confirmed(glob("a*"))
    for _ in range(2):
        assert router.ended(glob("a*")) == []
    assert not router.is_settled(literal("ab"))
    assert not router.live


# -- Size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, count",
    [
        ("chat:room-{}:*", 10_000),
        ("chat:room-{}", 2000),
        ("chat:*:{}", 2000),
        ("{}:*:typing", 2000),
        ("*-{}-*", 500),
    ],
)
def test_thousands_of_patterns(
    shape: str, count: int, monkeypatch: pytest.MonkeyPatch, say: Callable[[str], None]
) -> None:
    """The number of exact comparisons grows no faster than the number of patterns."""
    compared = 0

    def counting(*tokens: tuple[int, ...]) -> bool:
        nonlocal compared
        compared += 1
        return covers(*tokens)

    monkeypatch.setattr(_index, "covers", counting)
    router: Router[int] = Router()
    every = [Pattern(shape.format(i)) for i in range(count)]
    started = perf_counter()
    for i, pattern in enumerate(every):
        for command in router.add(i, [pattern]):
            router.confirmed(command.subscription)
    added = perf_counter()
    for i, pattern in enumerate(every):
        for command in router.remove(i, [pattern]):
            router.ended(command.subscription)
    say(
        f"router, {count} times {shape}: {compared} comparisons,"
        f" added in {added - started:.2f} s, removed in {perf_counter() - added:.2f} s"
    )
    assert compared <= 4 * count
    assert not router.live
