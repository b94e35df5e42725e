"""What is fuzzed: functions of bytes that return, or raise because something is wrong.

They hold whatever calls them: the fuzzer (`tests/faults/fuzz.py`), which looks for new paths, and
hypothesis (`tests/faults/test_fuzz.py`). Each compares two ways of saying one thing, so that more
is found than a crash: the short way of the wire with the long one, the matcher with regular
expressions, the reader of a connection with what its callers are owed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

from anyio.lowlevel import checkpoint
from pydantic import Field

from eventbus import Event, EventBus, InvalidEvent, InvalidPattern
from eventbus._envelope import Frame, message_of, own_layout, peek, read_head, time_of
from eventbus._handlers import SKIP, Body, stream_body
from eventbus._patterns import (
    MAX_NAME,
    Pattern,
    covers,
    decode_name,
    encode_name,
    escape,
    flaw,
    glob_matches,
    tokenize,
)
from eventbus._router import Subscription
from eventbus._settings import Settings
from eventbus.transports._inbox import Inbox
from eventbus.transports._link import Link
from eventbus.transports._outbox import Outbox
from eventbus.transports.base import Outgoing
from tests.faults.corpus.cases import Note, load


class Rich(Event):
    """Fields whose readers are written by others: none may raise what is not ours."""

    when: datetime | None = None
    price: Decimal | None = None
    key: UUID | None = None
    blob: bytes = b""
    table: dict[str, list[float]] = Field(default_factory=dict)
    anything: Any = None


# -- The wire --------------------------------------------------------------------------------------

BODIES = {
    "event": stream_body([Note], False),
    "union": stream_body([Note, Rich], False),
    "dict": stream_body([dict], False),
    "bare": stream_body([Note], True),
    "bare rich": stream_body([Rich], True),
    "bare dict": stream_body([dict], True),
}


def read(body: Body, payload: bytes) -> Any:
    """The message that this body makes of a payload, SKIP, or None when it is refused."""
    frame = Frame("in", payload)
    event, refusal = None, None
    try:
        event = body.decode(frame)
    except InvalidEvent as error:
        refusal = error
    assert refusal is None or refusal.reasons, "a refusal has reasons"
    assert len(str(refusal)) < 8000, "a refusal is short"
    message = message_of(frame, event, None, {}, bare=body.bare)
    assert all(isinstance(header, str | int | bool) for header in message.headers.values())
    return event if event is SKIP or event is None else message


def envelope(data: bytes) -> None:
    """Any payload is a message, is skipped, or is an InvalidEvent; both ways of reading agree."""
    found = {name: read(body, data) for name, body in BODIES.items()}
    for name in ("event", "dict"):
        message = found[name]
        if message not in (None, SKIP):
            assert read(BODIES[name], b" " + data) == message, "a blank before it changes nothing"


def head(data: bytes) -> None:
    """What the bytes of our layout say about source, type, time and number, JSON says too."""
    short = peek(data)
    own = own_layout(data)
    if own is not None and short is not None and own.end() == short.short:
        source, type, time, number = own.groups()
        same = (short.source, short.type, short.time, short.number)
        assert same == (source, type, time_of(time), int(number)), "two patterns, one head"
    with contextlib.suppress(InvalidEvent):
        read_head(data)
    if short is not None:
        try:
            long = read_head(data[: short.short] + b"null}")
        except InvalidEvent as error:
            raise AssertionError("the short way took what is no event") from error
        assert long == short._replace(short=0), "the short way read another head"


# -- Names -----------------------------------------------------------------------------------------


def regex_of(text: str) -> re.Pattern[bytes]:
    """A pattern of ours as a regular expression, by the rules of the documentation. `text` is known
    to be a pattern."""
    source, out, i = encode_name(text), b"", 0
    while i < len(source):
        one, two = source[i : i + 1], source[i : i + 2]
        i += 1
        if two in (b"{{", b"}}"):
            out, i = out + re.escape(one), i + 1
        elif one == b"{":
            end = source.index(b"}", i)
            out += b"([^:]+(?::[^:]+)*)" if source[i:end].endswith(b":path") else b"([^:]+?)"
            i = end + 1
        elif one == b"*":
            out += b".*?"
        elif one == b"?":
            out += b"."
        elif one == b"[":
            allowed, i = _class_of(source, i)
            out += (
                b"(?!)" if not allowed else b"[" + b"".join(b"\\x%02x" % b for b in allowed) + b"]"
            )
        elif one == b"\\" and i < len(source):
            out, i = out + re.escape(source[i : i + 1]), i + 1
        else:
            out += re.escape(one)
    return re.compile(out, re.DOTALL)


def _class_of(source: bytes, i: int) -> tuple[list[int], int]:
    """The bytes of the class whose bracket stands before `i`, and where it ends: as Redis reads it,
    with the bracket that is never closed and the range that takes the bracket in."""
    inverse = source[i : i + 1] == b"^"
    i += inverse
    allowed: set[int] = set()
    while i < len(source) and source[i : i + 1] != b"]":
        if source[i : i + 1] == b"\\" and i + 1 < len(source):
            allowed.add(source[i + 1])
            i += 2
        elif i + 2 < len(source) and source[i + 1 : i + 2] == b"-":
            low, high = sorted((source[i], source[i + 2]))
            allowed.update(range(low, high + 1))
            i += 3
        else:
            allowed.add(source[i])
            i += 1
    return sorted(set(range(256)) - allowed if inverse else allowed), i + 1


def pattern(data: bytes) -> None:
    """Any text is a pattern or an InvalidPattern. It matches what a regular expression of the same
    meaning matches, its own escaped text, and nothing that its covers do not."""
    first, _, rest = data.partition(b"\n")
    second, _, name = rest.partition(b"\n")
    text = decode_name(first)
    if not flaw(text) and len(first) <= MAX_NAME:
        assert Pattern(escape(text)).literal == first, "an escaped text is that text"
    found = [_parsed(text), _parsed(decode_name(second))]
    for parsed in found:
        if parsed is None or not name or len(name) > 40 or _cost(parsed) > 6:
            continue
        matched = regex_of(parsed.text).fullmatch(name)
        captures = parsed.match(name)
        assert (captures is None) == (matched is None), "one matches, the other does not"
        if matched is not None:
            expected = dict(zip(parsed.captures, map(decode_name, matched.groups()), strict=True))
            assert captures == expected, "captures are leftmost-shortest"
            assert glob_matches(tokenize(parsed.wire), name), "the server would not have sent it"
    one, two = found
    if one and two and name and covers(tokenize(one.wire), tokenize(two.wire)):
        wide, narrow = (glob_matches(tokenize(each.wire), name) for each in (one, two))
        assert wide or not narrow, "a cover lets something through"


def _parsed(text: str) -> Pattern | None:
    try:
        return Pattern(text)
    except InvalidPattern as error:
        refusal = error
    assert refusal.pattern == text, "the refusal names its pattern"
    assert str(refusal).isprintable(), "a refusal is escaped"
    return None


def _cost(parsed: Pattern) -> int:
    """How many tokens may take more than one byte: what a regular expression may try, backwards."""
    return sum(token < 0 for token in parsed.tokens)


# -- The connection --------------------------------------------------------------------------------

_GIANT = re.compile(rb"[*~%>|$=!]\+?\d{7,}")
"""A length that only a server could announce which wants our memory: hiredis sets it aside at
once, and that is the server's doing (docs/limits.md)."""
PUBLISHED = 3


class _Socket:
    """A transport that takes everything and leads nowhere."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.open = True

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.open = False

    def set_write_buffer_limits(self, high: int) -> None: ...

    def set_protocol(self, protocol: object) -> None: ...

    def resume_reading(self) -> None: ...


class _Owner:
    """Counts what became of what was published."""

    def __init__(self) -> None:
        self.published = 0
        self.unwatched: dict[Outgoing, Any] = {}

    def ended(self, outgoing: Outgoing, outcome: object) -> None: ...


def link() -> tuple[Link, _Socket]:
    """A link on a socket of nobody's."""
    socket = _Socket()
    writer = SimpleNamespace(transport=socket)
    connection = SimpleNamespace(_reader=SimpleNamespace(_buffer=b""), _writer=writer)
    return Link(connection), socket


class Ends:
    """A running bus whose receiver is the sink of a connection that we feed, and an outbox on
    another."""

    def __init__(self) -> None:
        self.bus = EventBus(f"memory://{secrets.token_hex(6)}")
        self.refused = 0

        @self.bus.on("in", "in:{x}")
        async def typed(event: Note) -> None: ...

        @self.bus.on("in*")
        async def raw(payload: bytes) -> None: ...

        @self.bus.exception_handler(InvalidEvent)
        async def count(error: InvalidEvent, message: object) -> None:
            self.refused += 1

    def feed(self, data: bytes, size: int) -> None:
        """Give both ends these bytes, in reads of this size, as what the server says."""
        run = self.bus._run
        assert run is not None
        # The subscriber: asked for two subscriptions, of which the first may be confirmed.
        subscriber, socket = link()
        inbox = Inbox(run.receiver, b"", b"__eventbus__:x", lambda token: None, lambda: None)
        inbox.opened(subscriber)
        inbox._patterns[b"in*"] = Subscription(True, b"in*")
        inbox.ping(b"beat", lambda answered: None)
        # The publisher: three messages are written and wait for their answers.
        publisher, other = link()
        outbox = Outbox(Settings(), lambda channel: 1, "nowhere")
        outbox.opened(publisher, hold=False)
        owner = _Owner()
        written = [self._publish(outbox, owner) for _ in range(PUBLISHED)]
        outbox._flush()
        for start in range(0, len(data), size):
            part = data[start : start + size]
            for end in (subscriber, publisher):
                if not end.ended.done():
                    end.parse(part)
        for end, its_socket in ((subscriber, socket), (publisher, other)):
            assert end.ended.done() != its_socket.open, "what is over is closed"
        for outgoing in written:
            assert outgoing.ended or outgoing in outbox._written, "a publish was forgotten"
        outbox.lost("the test is over")
        inbox.lost("the test is over")
        outbox.close()
        for outgoing in written:
            future = cast("asyncio.Future[int | None]", outgoing.future)
            assert future.done(), "a publish that nobody answers hangs for ever"
            future.exception()

    def _publish(self, outbox: Outbox, owner: _Owner) -> Outgoing:
        outgoing = Outgoing(b"in", b"{", b"}", False, "id", owner)
        outgoing.future = asyncio.get_running_loop().create_future()
        outbox.publish(outgoing)
        return outgoing


_loop = asyncio.new_event_loop()
_ends: list[Ends] = []


def resp(data: bytes) -> None:
    """Any bytes from a server end a connection at most, and every publish has an outcome."""
    if _GIANT.search(data):
        return
    _loop.run_until_complete(_resp(data))


async def _resp(data: bytes) -> None:
    if not _ends:
        logging.getLogger("eventbus").setLevel(logging.CRITICAL)
        _ends.append(Ends())
        await _ends[0].bus.start()
    size = data[0] + 1 if data else 1
    _ends[0].feed(data[1:], size)
    for _ in range(3):
        await checkpoint()  # the lanes' workers take their turn


def canary(data: bytes) -> None:
    """A target with a defect, by which one sees that the fuzzer finds any."""
    for place, byte in enumerate(b"bug"):
        if data[place : place + 1] != bytes([byte]):
            return
    raise AssertionError("the bird is dead")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "envelope": envelope,
    "head": head,
    "pattern": pattern,
    "resp": resp,
    "canary": canary,
}


# -- Seeds -----------------------------------------------------------------------------------------

NAMES = (
    r"* a* *a ? ?? [ab] [^ab] [a-c] [c-a] [a-] [ [] [^] []a] [\]] \* \ a\ {x} {x}{y} {x}:{y}"
    r" a:{x:path} {{{x}}} *{x}*{p:path} [a][^b]* *a*a*a*b {x {} {1} {x}{x} é [é] __* {x:int} a]b"
).split()
FRAMES = (
    b"*3|$9|subscribe|$14|__eventbus__:x|:1|",
    b"*3|$10|psubscribe|$3|in*|:2|*4|$8|pmessage|$3|in*|$2|in|$2|hi|",
    b'*3|$7|message|$2|in|$7|{"x":1}|',
    b"*3|$7|message|$2|in|*1|$1|a|",
    b"*2|$4|pong|$4|beat|:1|:0|-NOPERM no|-ERR what|+OK|$-1|*-1|*0|",
    b"%1|+a|:1|~1|+a|>2|+message|+b|#t|,1.5|(12345678901234567890|_|",
    b"=7|txt:abc|!5|ERR x|$?|;4|abcd|;0|*?|:1|.|",
    b"*1|" * 40 + b":1|",
    b"\x1b[31m|",
)
"""What servers say, and what they should not, with | for the end of a line."""


def seeds(target: str) -> list[bytes]:
    """Where the fuzzer begins."""
    if target == "pattern":
        names = [b"a", b"a:b", b"ab", b"]", b"a::b", "é".encode()]
        return [
            b"\n".join([text.encode(), NAMES[-i].encode(), names[i % 6]])
            for i, text in enumerate(NAMES)
        ]
    if target == "resp":
        said = [frame.replace(b"|", b"\r\n") for frame in FRAMES]
        return [bytes([size]) + lines for lines in said for size in (0, 6, 255)]
    if target == "canary":
        return [b"fine"]
    return [case.payload for case in load() if len(case.payload) <= 4096]


WORDS: dict[str, list[bytes]] = {
    "envelope": [
        *(b'"specversion":"1.0"', b'"id":"1f-1"', b'"source":"s"', b'"type":"Note"', b'"busseq":1'),
        *(
            b'"time":"2024-05-06T07:08:09Z"',
            b',"data":',
            b'{"x":1}',
            b'"data_base64":"eyJ4IjoxfQ=="',
        ),
        *(b'"h":', b"null", b"true", b"1e999", b"NaN", b"-0", b"\\u", b"ud800", b"\xed\xa0\x80"),
        *(b'"type":"Rich"', b'"when":', b'"price":', b'"key":', b'"blob":', b'"table":', b"[[["),
    ],
    "pattern": [*(name.encode() for name in NAMES), b"\n", b":", b"{{", b"}}", b":path}", b"[^"],
    "resp": [
        *(b"\r\n", b"$2\r\nin\r\n", b"$3\r\nin*\r\n", b"*3\r\n", b"*4\r\n", b"$-1\r\n", b"*-1\r\n"),
        *(
            b"$7\r\nmessage\r\n",
            b"$8\r\npmessage\r\n",
            b"$9\r\nsubscribe\r\n",
            b":1\r\n",
            b"-NOPERM",
        ),
        *(
            b"+OK\r\n",
            b"$4\r\npong\r\n",
            b"*0\r\n",
            b"%1\r\n",
            b"~1\r\n",
            b">2\r\n",
            b"(1\r\n",
            b"*?\r\n",
        ),
    ],
}
"""What the fuzzer puts in: words that it would be long in finding."""
WORDS["head"] = WORDS["envelope"]
WORDS["canary"] = [b"fine"]
