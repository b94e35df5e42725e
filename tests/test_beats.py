"""The beat: losses that no later message shows."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given
from hypothesis import strategies as st

from eventbus import Event, EventBus, Gap
from eventbus._beats import MAX_CHANNELS, Announcer, Beat, Listener
from eventbus._sequences import Inbound
from eventbus.server import Server
from tests.faults.ledger import source_of
from tests.helpers import Seen, soon

SOURCE = b"shop/1"


class Text(Event):
    text: str


class Model:
    """A source and a receiver with the stream between them, and the truth about both."""

    def __init__(self, limit: int = 1000) -> None:
        self.announcer = Announcer(SOURCE.decode(), 0, limit)
        self.inbound = Inbound()
        self.told: Counter[bytes] = Counter()
        self.listening: set[bytes] = set()
        self.listener = Listener(self.inbound, self.listening.__contains__, self._missed)
        self.away = False
        self.truth: Counter[bytes] = Counter()
        """What passed by while the receiver was away, on channels that it listened to."""
        self.known = False
        """Whether the receiver has heard a beat of the source since it last began to listen."""
        self.unprovable: Counter[bytes] = Counter()
        """Those of them that were sent before the receiver had heard a beat at all."""

    def _missed(self, channel: bytes, source: bytes, number: int) -> None:
        assert source == SOURCE
        self.told[channel] += number

    def publish(self, channel: bytes) -> None:
        number = self.announcer.take(channel)
        if channel not in self.listening:
            return
        if self.away:
            self.truth[channel] += 1
        else:
            self.told[channel] += self.inbound.hear(channel, SOURCE, number)

    def beat(self) -> None:
        if self.listener.asked:
            self.listener.asked = False
            self.announcer.repeat()
        for beat in self.announcer.beats():
            self.announcer.acknowledged(beat)
            if not self.away:
                self.listener.hear(beat.payload, b"other/2")
                self.known = True

    def back(self) -> None:
        if self.away:
            self.away = False
            self.listener.must_ask = True

    def listen(self, channel: bytes) -> None:
        if channel not in self.listening and not self.away:
            self.listening.add(channel)
            self.listener.widened += 1

    def settle(self) -> None:
        """What a few heartbeats do after the last outage."""
        for _ in range(3):
            if self.listener.must_ask:
                self.listener.must_ask = False
                self.listener.hear(b'{"source":"o/3","ask":true}', b"other/2")
            self.beat()


CHANNELS = [b"a", b"b", b"c", b"d"]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(CHANNELS)),
        st.tuples(st.just("listen"), st.sampled_from(CHANNELS)),
        st.tuples(st.sampled_from(["beat", "leave", "back", "settle"]), st.none()),
    ),
    max_size=60,
)


def play(model: Model, steps: list[tuple[str, bytes | None]]) -> None:
    """Do these in order."""
    for what, channel in steps:
        if what == "leave":
            model.away = True
        elif channel is not None:
            getattr(model, what)(channel)
        elif what != "settle" or not model.away:
            getattr(model, what)()


@given(STEPS)
def test_what_is_told_was_missed(steps: list[tuple[str, bytes | None]]) -> None:
    """Whatever happens in whatever order, no more is reported than was missed."""
    model = Model()
    play(model, steps)
    model.back()
    model.settle()
    for channel in CHANNELS:
        assert model.told[channel] <= model.truth[channel]


@given(STEPS)
def test_after_a_first_beat_every_loss_is_told(steps: list[tuple[str, bytes | None]]) -> None:
    """A receiver that listens to all from before the first beat is told of every message that it
    missed, also on channels first used meanwhile, and though nothing follows."""
    model = Model()
    for channel in CHANNELS:
        model.listen(channel)
    model.beat()
    play(model, [step for step in steps if step[0] != "listen"])
    model.back()
    model.settle()
    assert model.told == model.truth


@given(STEPS)
def test_a_source_that_forgets_channels_tells_too_little_and_never_too_much(
    steps: list[tuple[str, bytes | None]],
) -> None:
    """With more channels than a source remembers, its numbers begin anew: no false count."""
    model = Model(limit=2)
    for channel in CHANNELS:
        model.listen(channel)
    model.beat()
    play(model, steps)
    model.back()
    model.settle()
    for channel in CHANNELS:
        assert model.told[channel] <= model.truth[channel]


def test_one_heartbeat_announces_a_bounded_number() -> None:
    """What changed beyond the bound waits for the next heartbeat, oldest first."""
    announcer = Announcer("s/1", 0)
    names = [b"c%d" % n for n in range(MAX_CHANNELS + 5)]
    for name in names:
        announcer.take(name)
    first = [channel for beat in announcer.beats() for channel in beat.last]
    second = [channel for beat in announcer.beats() for channel in beat.last]
    assert first == names[:MAX_CHANNELS]
    assert second == names[MAX_CHANNELS:]
    assert announcer.beats() == []


def test_one_announcement_is_small() -> None:
    """A receiver's loop is not held up by one announcement."""
    announcer = Announcer("s/1", 0)
    for n in range(5000):
        announcer.take(b"channel:%d" % n)
    assert max(len(beat.payload) for beat in announcer.beats()) < 64 * 1024


def test_changes_that_are_too_many_are_counted() -> None:
    """Over its limit a source forgets the oldest change, and counts it."""
    announcer = Announcer("s/1", 0, limit=3)
    for n in range(5):
        announcer.take(b"c%d" % n)
    assert announcer.unannounced == 2
    assert [list(beat.last) for beat in announcer.beats()] == [[b"c2", b"c3", b"c4"]]


def test_what_did_not_arrive_is_announced_again() -> None:
    """A failed announcement comes again with the next one, unless there is a newer number."""
    announcer = Announcer("s/1", 0)
    announcer.take(b"a")
    announcer.take(b"b")
    (lost,) = announcer.beats()
    announcer.take(b"a")
    announcer.failed(lost)
    (again,) = announcer.beats()
    assert again.last == {b"a": 2, b"b": 1}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"source":1,"beat":1,"last":{}}',
        b'{"source":"s","beat":"x","last":{}}',
        b'{"source":"s","beat":1,"last":[]}',
        b'{"source":"s","beat":1,"last":{"a":1}}',
        b'{"source":"s","beat":1,"last":{"a":[1]}}',
        b'{"source":"s","beat":1,"last":{"a":["x",1]}}',
        b'{"source":"s","beat":0,"last":{"a":[1,1]}}',
        b'{"source":"s","beat":1,"last":{"a":[-1,1]}}',
        b'{"source":"s","beat":1,"last":{"a":[1e300,1]}}',
        b'{"source":"s","beat":1,"all":[],"last":{"a":[1,1]}}',
        b'{"source":"\xed\xa0\x80"}',
        b'{"source":"%b","beat":1,"last":{"a":[1,1]}}' % (b"s" * 600),
        b'{"source":"s","beat":1,"last":{"a":[1,1]}}' + b" " * 100_000,
    ],
)
def test_what_is_no_announcement_changes_nothing(payload: bytes) -> None:
    """Anybody may write to the channel of the beats: nonsense is passed over."""
    model = Model()
    model.listen(b"a")
    model.listener.hear(payload, b"other/2")
    assert not model.told
    assert not model.listener._sources
    assert len(model.inbound) == 0


def test_own_announcements_and_old_ones_change_nothing() -> None:
    """A bus hears itself too, and a replayed announcement is stale."""
    model = Model()
    model.listen(b"a")
    model.publish(b"a")
    (beat,) = model.announcer.beats()
    model.listener.hear(beat.payload, SOURCE)
    assert not model.listener._sources
    model.listener.hear(beat.payload, b"other/2")
    model.listener.hear(beat.payload, b"other/2")
    assert not model.told.total()


def test_a_hole_in_the_announcements_is_asked_about_until_it_is_closed() -> None:
    """An announcement that did not come leaves what it said unknown, until a whole repetition."""
    model = Model()
    model.listen(b"a")
    model.beat()
    state = model.listener._sources[SOURCE]
    for channel in (b"a", b"b"):
        model.away = channel == b"a"
        model.publish(channel)
        model.beat()
    assert model.listener.must_ask
    assert (state.upto, state.run, state.last) == (1, 3, 3)
    model.settle()
    assert state.upto == state.last
    assert model.told == {b"a": 1}


def test_a_repetition_names_no_channel_that_was_forgotten_meanwhile() -> None:
    """A source repeats what it remembers when the turn comes."""
    announcer = Announcer("s/1", 0, limit=2)
    for name in (b"a", b"b"):
        announcer.take(name)
    announcer.beats()
    announcer.repeat()
    for n in range(4):
        announcer.take(b"c%d" % n)
    said = [channel for beat in announcer.beats() for channel in beat.last]
    assert b"a" not in said


def test_sources_are_forgotten_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of sources is bounded: the one not heard for longest goes."""
    monkeypatch.setattr("eventbus._beats._MAX_SOURCES", 3)
    model = Model()
    for n in (0, 1, 2, 0, 3):
        said = {"source": f"s{n}", "beat": 1, "last": {}}
        model.listener.hear(orjson.dumps(said), b"other/2")
    assert list(model.listener._sources) == [b"s2", b"s0", b"s3"]


def test_a_receiver_that_forgot_pairs_claims_nothing_new() -> None:
    """Once pairs were forgotten, an unknown channel may be an old one: no count without proof."""
    inbound = Inbound(limit=4)
    told: list[Any] = []
    listener = Listener(inbound, lambda channel: True, lambda *what: told.append(what))
    announcer = Announcer("s/1", 0)
    said: list[Beat] = announcer.beats()
    announcer.acknowledged(said[0])
    for n in range(9):
        number = announcer.take(b"c%d" % n)
        inbound.hear(b"c%d" % n, b"s/1", number)
    said += announcer.beats()
    for beat in said:
        listener.hear(beat.payload, b"other/2")
    assert inbound.forgot
    assert not told


# -- On real servers ------------------------------------------------------------------------------


class Heard:
    """A receiver with the beat on, and what it was told."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.bus = EventBus(url, heartbeat=0.2, **settings)
        self.texts: Seen[str] = Seen()
        self.missed: Counter[str | None] = Counter()
        self.changed = asyncio.Event()

        @self.bus.on("c:*")
        async def keep(event: Text) -> None:
            self.texts.append(event.text)

        @self.bus.on_gap("c:*")
        async def tell(gap: Gap) -> None:
            if gap.reason == "sequence":
                self.missed[gap.channel] += gap.missed or 0
                self.changed.set()

    async def told(self, total: int) -> None:
        """Wait until this many were reported missing."""
        async with asyncio.timeout(20):
            while self.missed.total() < total:
                self.changed.clear()
                await self.changed.wait()

    async def knows(self, source: str) -> None:
        """Wait until it has heard a beat of this source."""
        listener = self.bus._run and self.bus._run.receiver.listener
        async with asyncio.timeout(20):
            while listener and source.encode() not in listener._sources:
                await checkpoint()


async def lose_five(heard: Heard, source: EventBus) -> None:
    """While the receiver is cut off, the source says its last words on a known channel and its
    first ones on a new one; nothing follows."""
    await source.publish("c:old", Text(text="1"))
    await heard.texts.reach(1)
    run = heard.bus._run
    assert run is not None
    endpoint = run.transport._endpoint
    opened, endpoint.open = endpoint.open, _refuse
    await source.redis().client_kill_filter(_type="pubsub")
    async with asyncio.timeout(20):
        while heard.bus.health():
            await checkpoint()
    for channel in ("c:old", "c:old", "c:new", "c:new", "c:new"):
        await source.publish(channel, Text(text="lost"))
    endpoint.open = opened


async def _refuse() -> Any:
    raise OSError("not yet")


@pytest.mark.parametrize("namespace", ["", "staging"])
async def test_the_last_messages_and_new_channels_are_found(namespace: str) -> None:
    """The last messages of a channel and those of a new one, lost in an outage with nothing after
    them, are told exactly."""
    with Server() as server:
        heard = Heard(server.url, beat=True, namespace=namespace)
        source = EventBus(server.url, heartbeat=0.2, beat=True, namespace=namespace)
        async with heard.bus, source:
            await heard.knows(source_of(source))
            await lose_five(heard, source)
            await heard.told(5)

            assert heard.missed == {"c:old": 2, "c:new": 3}
            assert heard.bus.stats().missed == 5


async def test_without_the_beat_they_are_not_found() -> None:
    """The control: with the beat off, the reconnect is told and the same loss has no number."""
    with Server() as server:
        heard, witness = Heard(server.url), Heard(server.url, beat=True)
        source = EventBus(server.url, heartbeat=0.2, beat=True)
        async with heard.bus, witness.bus, source:
            await witness.knows(source_of(source))
            await lose_five(heard, source)
            async with asyncio.timeout(20):
                while not heard.bus.stats().reconnects or not witness.bus.stats().reconnects:
                    await checkpoint()
            await _a_beat_later(source, witness, 3)

            assert heard.missed.total() == 0


async def test_a_newcomer_is_told_nothing_of_before(server: Server) -> None:
    """A bus that starts late, and a pattern that is attached late, missed nothing of before."""
    source = EventBus(server.url, heartbeat=0.2, beat=True)
    heard = Heard(server.url, beat=True)
    seen: Seen[str] = Seen()

    async def late(event: Text) -> None:
        seen.append(event.text)

    async with source:
        for _ in range(3):
            await source.publish("c:1", Text(text="before"))
            await source.publish("d:1", Text(text="before"))
        async with heard.bus:
            await heard.knows(source_of(source))
            await source.publish("d:2", Text(text="before"))
            await heard.bus.attach(late, "d:*")
            await source.publish("d:1", Text(text="now"))
            await source.publish("d:2", Text(text="now"))
            await seen.reach(2)
            await source.publish("c:1", Text(text="now"))
            await heard.texts.reach(1)
            await _a_beat_later(source, heard, 3)

            assert heard.bus.stats().missed == 0


async def _a_beat_later(source: EventBus, heard: Heard, beats: int = 1) -> None:
    """Publish something, and wait for the announcement of it, so many times."""
    listener = heard.bus._run and heard.bus._run.receiver.listener
    assert listener is not None
    name = source_of(source).encode()
    for _ in range(beats):
        last = listener._sources[name].last if name in listener._sources else 0
        await source.publish("elsewhere", Text(text="now"))
        async with asyncio.timeout(20):
            while name not in listener._sources or listener._sources[name].last <= last:
                await checkpoint()


async def test_a_lost_announcement_is_asked_for(server: Server) -> None:
    """A receiver that notices a hole in the announcements asks; the source says it all again."""
    source = EventBus(server.url, heartbeat=0.2, beat=True)
    heard = Heard(server.url, beat=True)
    async with heard.bus, source:
        await source.publish("c:1", Text(text="1"))
        await heard.texts.reach(1)
        await heard.knows(source_of(source))
        listener = heard.bus._run and heard.bus._run.receiver.listener
        assert listener is not None
        state = listener._sources[source_of(source).encode()]
        state.last -= 1  # as if the one before had not come
        state.upto -= 1
        await source.publish("c:1", Text(text="2"))
        async with asyncio.timeout(20):
            while state.upto < state.last or state.run < state.last:
                await checkpoint()

    assert heard.bus.stats().missed == 0


async def test_the_beat_is_no_message(server: Server) -> None:
    """Announcements count as neither published nor received, and reach no handler."""
    seen: Seen[bytes] = Seen()
    bus = EventBus(server.url, heartbeat=0.05, beat=True)

    @bus.on("*")
    async def everything(payload: bytes) -> None:
        seen.append(payload)

    async with bus, EventBus(server.url, heartbeat=0.05, beat=True) as other:
        await other.publish("c:1", Text(text="1"))
        listener = bus._run and bus._run.receiver.listener
        assert listener is not None
        async with asyncio.timeout(20):
            while source_of(other).encode() not in listener._sources:
                await checkpoint()
        await seen.reach(1)
        stats = bus.stats()
        assert (stats.published, stats.received, len(seen)) == (0, 1, 1)


def test_the_beat_needs_a_heartbeat() -> None:
    """Without a heartbeat there is no time for it: a sentence says so."""
    with pytest.raises(ValueError, match="heartbeat"):
        EventBus("memory://x", beat=True, heartbeat=None)


async def test_too_many_changes_are_said_once(server: Server, log: Any) -> None:
    """A source that forgets changes before their turn says so in the log."""
    async with EventBus(server.url, heartbeat=0.05, beat=True) as bus:
        pulse = bus._run and bus._run._pulse
        assert pulse is not None
        pulse._announcer._limit = 2
        for n in range(4):
            await bus.publish(f"many:{n}", Text(text="x"))
        await log.hear("more channels change")
        beats = pulse._announcer._index
        async with asyncio.timeout(20):
            while pulse._announcer._index < beats + 2:
                await bus.publish("many:0", Text(text="x"))
    assert sum("more channels change" in line for line in log.lines) == 1


async def test_a_denied_beat_is_said_once(say: Callable[[str], None], log: Any) -> None:
    """A user who may not subscribe to the channel of the beats is told so in the log."""
    with Server(port=0) as server:
        async with EventBus(server.url) as admin:
            rules = ("resetchannels", "&c:*", "+@all", "nopass", "on")
            await admin.redis().execute_command("ACL", "SETUSER", "app", *rules)
        async with EventBus(f"redis://app:x@localhost:{server.port}", heartbeat=0.2, beat=True):
            await soon(log.hear("beats"))
