"""Properties of whatever reads foreign bytes: hypothesis in the usual run, the fuzzer in the long.

The targets (`corpus/targets.py`) raise when something is wrong; here are the inputs. What a live
connection makes of any bytes is tried with a server that says them, too.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from eventbus import Event, EventBus, EventBusError, InvalidEvent, PublishUncertain, Receipt
from eventbus.server import Server
from tests.faults.corpus import targets
from tests.faults.corpus.cases import load
from tests.faults.proxy import Proxy, saying
from tests.helpers import Lines, Seen, soon

ROOT = Path(__file__).parents[2]
FRAMES = [case.payload for case in load() if len(case.payload) <= 1024]
RESP = targets.seeds("resp")


@st.composite
def mutants(draw: st.DrawFn, origins: list[bytes]) -> bytes:
    """One of these with bytes flipped, put in, taken out, or said twice."""
    found = bytearray(draw(st.sampled_from(origins)))
    for _ in range(draw(st.integers(1, 5))):
        place = draw(st.integers(0, len(found)))
        size = draw(st.integers(0, 8))
        more = draw(
            st.binary(max_size=3)
            | st.sampled_from([b'"', b"\\", b"}", b"{", b",", b":", b"\r\n", b"$", b"*", b"\xff"])
            | st.just(bytes(found[place : place + 20]))
        )
        found[place : place + size] = more
    return bytes(found)


# -- Payloads --------------------------------------------------------------------------------------


@pytest.mark.scenario(37)
@settings(max_examples=400)
@given(st.binary(max_size=200) | mutants(FRAMES))
def test_any_payload_is_a_message_or_an_invalid_event(payload: bytes) -> None:
    """Nothing but a message, a skip or an InvalidEvent comes out of any bytes, and the short way
    and the long way of reading agree about them."""
    targets.envelope(payload)
    targets.head(payload)


class Known(Event):
    x: int


@pytest.mark.scenario(37)
@settings(max_examples=100)
@given(st.lists(mutants(FRAMES), max_size=4))
async def test_any_payloads_hurt_only_themselves(payloads: list[bytes]) -> None:
    """After any payloads, read in every way at once, the next good event is delivered to all, and
    nobody but the exception handler of InvalidEvent has heard of them."""
    bus = EventBus("memory://any-payloads")
    good: Seen[str] = Seen()
    others: list[BaseException] = []
    invalid = 0

    @bus.on("in")
    async def typed(event: Known) -> None:
        if event.x == 424242:
            good.append("typed")

    @bus.on("in")
    async def table(data: dict[str, object]) -> None:
        if data.get("x") == 424242:
            good.append("dict")

    @bus.on("in", wire="bare")
    async def bare(data: dict[str, object]) -> None:
        if data.get("type") == "Known":
            good.append("bare")

    @bus.exception_handler(Exception)
    async def other(error: Exception, message: object) -> None:
        others.append(error)

    @bus.exception_handler(InvalidEvent)
    async def refuse(error: InvalidEvent, message: object) -> None:
        nonlocal invalid
        invalid += 1

    async with bus:
        for payload in payloads:
            await bus.publish_raw("in", payload)
        await bus.publish("in", Known(x=424242))
        await good.reach(3)
    assert sorted(good)[-3:] == ["bare", "dict", "typed"]
    assert others == []
    assert bus.stats().invalid == invalid <= len(payloads)
    assert bus.stats().failed == 0


# -- Names -----------------------------------------------------------------------------------------

pieces = st.sampled_from([*targets.NAMES, *"*?[]^-\\{}:ab", "é", "\udcff", "\x00", "\u202e"])
texts = st.lists(pieces, max_size=8).map("".join) | st.text(max_size=20)


@pytest.mark.scenario(39, 40)
@settings(max_examples=400)
@given(texts, texts, st.text("ab:]^-é\\", min_size=1, max_size=12))
@example("{x:path}", "*", "a:b")
@example("[a-", "[a-]", "]")
def test_any_text_is_a_pattern_or_is_refused_as_one(one: str, two: str, name: str) -> None:
    """Any text is a pattern or an InvalidPattern whose text is escaped; it matches what a regular
    expression of the same meaning matches."""
    words = (text.encode("utf-8", "surrogatepass") for text in (one, two, name))
    targets.pattern(b"\n".join(word.replace(b"\n", b"") for word in words))


# -- Connections -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server on a TCP port: what is said in its place comes from the proxy."""
    with Server(port=0) as found:
        yield found


@pytest.mark.scenario(9, 10)
@settings(max_examples=300)
@given(st.binary(max_size=100) | mutants(RESP))
def test_any_answer_ends_a_connection_at_most(said: bytes) -> None:
    """Any bytes from a server end a connection at most; every publish has an outcome."""
    targets.resp(said)


@pytest.mark.scenario(9, 10)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutants(RESP).map(lambda said: said[1:]))
async def test_any_answer_of_a_live_server(server: Server, said: bytes) -> None:
    """Whatever a server says to a subscriber or a publisher, nothing but an error of ours reaches
    the user, in time, and the bus works when the server does."""
    loop = asyncio.get_running_loop()
    strange: list[object] = []
    loop.set_exception_handler(lambda loop, context: strange.append(context))
    seen: Seen[int] = Seen()
    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url, heartbeat=None, publish_timeout=0.2)

        @bus.on("live")
        async def see(event: Known) -> None:
            seen.append(event.x)

        try:
            async with bus:
                proxy.answer = saying(SUBSCRIBE=said, PUBLISH=said)
                proxy.mode = "answer"
                proxy.cut()
                try:
                    found = await soon(bus.publish("live", Known(x=1)))
                except EventBusError as error:
                    found = error
                assert isinstance(found, Receipt | EventBusError)
                proxy.mode = "pass"
                proxy.cut()
                async with asyncio.timeout(20):
                    while 2 not in seen:
                        try:
                            await bus.publish("live", Known(x=2))
                        except EventBusError:
                            continue
        finally:
            loop.set_exception_handler(None)
    assert strange == []
    assert bus.stats().failed == 0


@pytest.mark.scenario(10)
async def test_no_answer_makes_a_publish_hang(server: Server, log: Lines) -> None:
    """An answer that is nested deeper than Python can show it is an uncertain publish, in time."""
    async with Proxy(server.port) as proxy:
        bus = EventBus(proxy.url, heartbeat=None)

        @bus.on("a")
        async def ignore(payload: bytes) -> None: ...

        async with bus:
            proxy.answer = saying(PUBLISH=b"*1\r\n" * 1010 + b":1\r\n")
            proxy.mode = "answer"
            [publisher] = [pair for pair in proxy.living() if pair.role != "subscriber"]
            publisher.cut()
            await log.hear("connected again")
            with pytest.raises(PublishUncertain):
                await soon(bus.publish_raw("a", b""))


def resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.scenario(10)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc (Linux)")
@pytest.mark.parametrize("said", [b"$536870912\r\n", b"*100000\r\n", b"%100000\r\n"])
async def test_an_announcement_costs_no_memory(said: bytes) -> None:
    """A length is believed when its bytes are there: announcing one costs the receiver nothing."""
    ends = []
    before = resident()
    for _ in range(20):
        end, _socket = targets.link()
        end.parse(said)
        ends.append(end)
    assert resident() - before < 64 << 20
    assert not any(end.ended.done() for end in ends)


# -- The fuzzer ------------------------------------------------------------------------------------


NO_FUZZER = "atheris is not installed (pip install atheris; it has wheels for Linux)"


def fuzz(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer as people do."""
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=240,
        check=False,
    )


@pytest.mark.long
@pytest.mark.skipif(find_spec("atheris") is None, reason=NO_FUZZER)
@pytest.mark.parametrize("target", [name for name in targets.TARGETS if name != "canary"])
def test_the_fuzzer_finds_nothing(target: str, tmp_path: Path) -> None:
    """Twenty seconds of coverage-guided fuzzing break no target."""
    done = fuzz(target, "--seconds", "20", "--keep", str(tmp_path))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "number_of_executed_units" in said


@pytest.mark.long
@pytest.mark.skipif(find_spec("atheris") is None, reason=NO_FUZZER)
def test_the_fuzzer_would_find_something(tmp_path: Path) -> None:
    """A target with a defect is broken by the fuzzer, which says by what, and by `--input`."""
    done = fuzz("canary", "--seconds", "60", "--keep", str(tmp_path))
    assert done.returncode != 0
    assert "broken by: b'bug" in done.stdout
    [found] = tmp_path.glob("crash-*")
    again = fuzz("canary", "--input", str(found))
    assert again.returncode != 0
    assert "the bird is dead" in again.stderr
