"""The language of names, judged by live servers, by slow references, and by tables."""

from __future__ import annotations

import itertools
import random
import re
import socket
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial

import hiredis
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from eventbus._errors import InvalidChannel, InvalidPattern
from eventbus._patterns import (
    ANY,
    MAX_NAME,
    PATH,
    SEGMENT,
    STAR,
    Pattern,
    Template,
    _align,
    _table,
    _token,
    check_channel,
    covers,
    decode_name,
    encode_name,
    escape,
    flaw,
    glob_matches,
    literal_prefix,
    oversize,
    tokenize,
)
from eventbus.server import Server

Say = Callable[[str], None]
Tokens = tuple[int, ...]

# -- The oracle ------------------------------------------------------------------------------------


class Oracle:
    """A live server's opinion: which of these globs match which of these names."""

    def __init__(self, path: str) -> None:
        self.pairs = self.matches = 0
        self._subscriber, self._publisher = Wire(path), Wire(path)

    def close(self) -> None:
        self._subscriber.close()
        self._publisher.close()

    def __call__(self, globs: Iterable[bytes], names: Iterable[bytes]) -> set[tuple[bytes, bytes]]:
        """The pairs that match. Redis's own count of receivers must say the same."""
        globs, names = list(dict.fromkeys(globs)), list(dict.fromkeys(names))
        self._subscriber.send([[b"PSUBSCRIBE", *globs], [b"PING", b"ready"]])
        self._subscriber.read_to(b"ready")
        self._publisher.send([[b"PUBLISH", name, b""] for name in names])
        counts = {name: self._publisher.read() for name in names}
        self._subscriber.send([[b"PING", b"all"], [b"PUNSUBSCRIBE"], [b"PING", b"done"]])
        found = {(frame[1], frame[2]) for frame in self._subscriber.read_to(b"all")}
        self._subscriber.read_to(b"done")
        assert counts == {name: sum(pair[1] == name for pair in found) for name in names}
        self.pairs += len(globs) * len(names)
        self.matches += len(found)
        return found


class Wire:
    """RESP on a unix socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(path)
        self._reader = hiredis.Reader()

    def close(self) -> None:
        self._socket.close()

    def send(self, commands: Iterable[list[bytes]]) -> None:
        for words in commands:
            self._socket.sendall(hiredis.pack_command(tuple(words)))  # type: ignore[arg-type]

    def read(self) -> object:
        while (reply := self._reader.gets()) is False:
            received = self._socket.recv(1 << 16)
            assert received, "the server hung up"
            self._reader.feed(received)
        assert not isinstance(reply, Exception), reply
        return reply

    def read_to(self, token: bytes) -> list[list[bytes]]:
        """The frames before the answer to `PING token` (an array while anything is subscribed)."""
        found = []
        while (frame := self.read()) not in (token, [b"pong", token]):
            assert isinstance(frame, list)
            found.append(frame)
        return found


@pytest.fixture(scope="module")
def oracle(server: Server, say: Say) -> Iterator[Oracle]:
    """Each server in turn; says in the end how many cases it judged."""
    judge = Oracle(server.socket_path)
    yield judge
    judge.close()
    found = re.search(r"(\w+) version=([\d.]+)", server.log(), re.IGNORECASE)
    version = " ".join(found.groups()) if found else "an unknown server"
    pairs, matches = judge.pairs, judge.matches
    say(f"globs against {version}: {pairs:,} pairs of a glob and a name, {matches:,} of them match")


# -- What is tried ---------------------------------------------------------------------------------

ANY_BYTE = bytes(range(256))
SPECIAL = "**??[[]]^--\\\\"
ORDINARY = "ab:c{}!é€\udc80\udcff"
text_pieces = st.sampled_from([*SPECIAL, *SPECIAL, *ORDINARY, "[a-c]", "[^b]", "[c-a]", "[\\]]"])
texts = st.lists(text_pieces, min_size=1, max_size=9).map("".join)
capture_pieces = st.sampled_from(["{x}", "{y}", "{z}", "{{", "}}", *SPECIAL, *"aab::é"])
raw_bytes = st.sampled_from(b"**??[[]]]^^--\\\\aabcz:!{}\x00\n\x7f\x80\xc3\xa9\xff")
raw_globs = st.lists(raw_bytes, max_size=12).map(bytes)


def ascii_classes(glob: bytes) -> bytes:
    """The same glob without the non-ASCII bytes that are inside brackets."""
    found, i = b"", 0
    while i < len(glob):
        _, end = _token(glob, i)
        piece = glob[i:end]
        found += bytes(b for b in piece if b < 128) if glob[i : i + 1] == b"[" else piece
        i = end
    return found


def word(tokens: Iterable[int], rng: random.Random, alphabet: bytes = b"ab:c*\\]\xc3\xff") -> bytes:
    """One random name of the tokens' language (b"" where a set has no bytes)."""
    found = bytearray()
    for token in tokens:
        if token in (STAR, PATH):
            found += bytes(rng.choices(alphabet, k=rng.choice((0, 0, 1, 2, 4))))
        elif token == SEGMENT:
            found += bytes(rng.choices(b"ab\xc3", k=rng.choice((1, 1, 2, 3))))
        else:
            near = [byte for byte in alphabet if token >> byte & 1]
            all_bytes = [byte for byte in range(256) if token >> byte & 1]
            if not all_bytes:
                return b""
            found.append(rng.choice(near or all_bytes))
    return bytes(found)


def mutant(name: bytes, rng: random.Random, alphabet: bytes = b"ab:c*\\]\xc3\xff") -> bytes:
    """`name` with one byte put in, taken out or replaced."""
    i, size = rng.randint(0, len(name)), rng.choice((0, 1))
    return name[:i] + bytes(rng.choices(alphabet, k=rng.choice((0, 1)))) + name[i + size :]


def names_for(rows: Iterable[Tokens], rng: random.Random) -> list[bytes]:
    """Names near the languages of all these rows: some inside, some just outside."""
    inside = [word(tokens, rng) for tokens in rows for _ in range(2)]
    return [name for name in (*inside, *(mutant(name, rng) for name in inside)) if name]


seeds = st.randoms(use_true_random=False)

# -- Globs are Redis's -----------------------------------------------------------------------------

ODD = r"""
* ** ? ?* *? [ [^ [] [^] []a] [^]a] [a [^a [ab [a- [a-] [a-]] [a-]b] [z-a] [c-a]* [!a] [^!a]
[--a] [-a] [a-c-e] [^-a] [^^] [\ [\] [\]] [\]a] [\a-c] [a-\] [a-\]] [a\-c] [\-a] [^\^] [[] [[a]
\ \\ \* \? \[ \a a\ \[a] [a]\ *\ *a*b* a*a*a*b *[ab]*[^c]? [*] [?] [\*] {a} {a,b} a{2} [{}] é
[a]] [^a]] [a][b] [a-c][^a-c] *] *[ *[^ ?[] *[]* *[^]* ^a [^a-] - [-] [--] [---] [a--] [\\-a]
[Z-a]
""".encode().split()


@pytest.mark.scenario(40)
def test_every_short_glob(oracle: Oracle) -> None:
    """Every glob of up to four of eight odd characters matches what the server says it matches."""
    globs = [bytes(g) for n in range(5) for g in itertools.product(b"*?[]^-\\a", repeat=n)]
    names = [bytes(n) for k in (1, 2) for n in itertools.product(b"ab]^-\\", repeat=k)]
    found = oracle(globs, names)
    for text in globs:
        tokens = tokenize(text)
        for name in names:
            assert glob_matches(tokens, name) == ((text, name) in found), (text, name)


@pytest.mark.scenario(40)
def test_odd_globs(oracle: Oracle) -> None:
    """Unclosed, empty, reversed, escaped classes and trailing backslashes mean what Redis says."""
    rng = random.Random(1)
    names = [bytes(n) for n in itertools.product(b"ab]-", repeat=3)]
    names += [bytes([byte]) for byte in ANY_BYTE]
    names += names_for([tokenize(glob) for glob in ODD * 5], rng)
    found = oracle(ODD, names)
    for text in ODD:
        for name in names:
            assert glob_matches(tokenize(text), name) == ((text, name) in found), (text, name)


@pytest.mark.scenario(40)
@settings(max_examples=100)
@given(st.lists(raw_globs.map(ascii_classes), min_size=1, max_size=15), seeds)
def test_raw_globs(oracle: Oracle, globs: list[bytes], rng: random.Random) -> None:
    """A glob of any bytes (ASCII inside brackets) matches exactly what it matches on the server."""
    names = names_for(map(tokenize, globs), rng) or [b"a"]
    found = oracle(globs, names)
    for text in globs:
        for name in names:
            assert glob_matches(tokenize(text), name) == ((text, name) in found), (text, name)


def parsed(candidates: Iterable[str]) -> list[Pattern]:
    """Those of the texts that are patterns."""
    found = []
    for text in candidates:
        try:
            found.append(Pattern(text))
        except InvalidPattern:
            continue
    return found


@pytest.mark.scenario(40)
@settings(max_examples=100)
@given(st.lists(texts, min_size=5, max_size=25), seeds)
def test_patterns(oracle: Oracle, candidates: list[str], rng: random.Random) -> None:
    """A pattern without captures matches exactly what its wire form matches on the server."""
    patterns = [p for p in parsed(candidates) if not p.captures]
    assume(patterns)
    names = names_for((p.tokens for p in patterns), rng) or [b"a"]
    found = oracle((p.wire for p in patterns), names)
    for pattern in patterns:
        assert tokenize(pattern.wire) == pattern.tokens
        for name in names:
            matched = pattern.match(name)
            assert (matched == {}) == ((pattern.wire, name) in found), (pattern, name)
            assert matched in ({}, None)


@pytest.mark.scenario(40)
@settings(max_examples=60)
@given(st.lists(st.lists(capture_pieces, min_size=1, max_size=7), min_size=4, max_size=15), seeds)
def test_captures_on_the_wire(
    oracle: Oracle, candidates: list[list[str]], rng: random.Random
) -> None:
    """What a pattern with captures matches arrives: the server's star takes all that they take."""
    patterns = parsed("".join(pieces) for pieces in candidates)
    patterns += parsed("".join(pieces) + "{p:path}" for pieces in candidates)
    assume(patterns)
    names = names_for((p.tokens for p in patterns), rng) or [b"a"]
    found = oracle((p.wire for p in patterns), names)
    for pattern in patterns:
        plain = tuple(STAR if token < 0 else token for token in pattern.tokens)
        assert tokenize(pattern.wire) == plain
        for name in names:
            assert glob_matches(plain, name) == ((pattern.wire, name) in found)
            assert pattern.match(name) is None or (pattern.wire, name) in found, (pattern, name)


@settings(max_examples=60)
@given(st.lists(st.text(max_size=6) | texts, min_size=1, max_size=20), seeds)
def test_escape(oracle: Oracle, candidates: list[str], rng: random.Random) -> None:
    """An escaped text is a pattern that matches that text alone, here and on the server."""
    names = {text: encode_name(text) for text in candidates if not flaw(text)}
    assume(names)
    patterns = {text: Pattern(escape(text)) for text in names}
    others = [near for name in names.values() if (near := mutant(name, rng))]
    found = oracle((p.wire for p in patterns.values()), [*names.values(), *others])
    assert found == {(patterns[text].wire, name) for text, name in names.items()}
    for text, pattern in patterns.items():
        assert pattern.literal == names[text]
        assert [n for n in (*names.values(), *others) if pattern.match(n) == {}][:1] == [
            names[text]
        ]
        assert not any(pattern.match(n) for n in others if n != names[text])


# -- Captures are leftmost-shortest ----------------------------------------------------------------

# A pattern as a list of pieces: bytes (a literal), a frozenset of bytes, "*", or a capture's name
# ("p" is the path). The reference tries all splits, the shortest first.
Piece = bytes | frozenset[int] | str
every_byte = frozenset(range(256))
CLASSES = {
    "?": every_byte,
    "[ab]": frozenset(b"ab"),
    "[^a]": every_byte - set(b"a"),
    "[a-c]": frozenset(b"abc"),
    "[:b]": frozenset(b":b"),
    "[^:]": every_byte - set(b":"),
}
LITERALS = {"a": b"a", "b": b"b", ":": b":", "é": b"\xc3\xa9", "{{": b"{", "}}": b"}", "\\*": b"*"}
LITERALS |= {"\\\\": b"\\", "\\{": b"{"}


def pieces_of(spelled: list[str]) -> list[Piece]:
    """The pieces that these spellings stand for."""
    return [CLASSES.get(s) or LITERALS.get(s) or s.strip("{}")[0] for s in spelled]


def fits(piece: Piece, part: bytes) -> bool:
    """Whether a part of a name is what one piece takes."""
    if isinstance(piece, bytes):
        return part == piece
    if isinstance(piece, frozenset):
        return len(part) == 1 and part[0] in piece
    if piece == "*":
        return True
    return all(part.split(b":")) if piece == "p" else bool(part) and b":" not in part


def reference(pieces: list[Piece], name: bytes) -> dict[str, str] | None:
    """The captures by trying every split, the leftmost piece as short as possible first."""

    @cache
    def search(i: int, start: int) -> tuple[bytes, ...] | None:
        if i == len(pieces):
            return () if start == len(name) else None
        for end in range(start, len(name) + 1):
            if fits(pieces[i], name[start:end]):
                rest = search(i + 1, end)
                if rest is not None:
                    return (name[start:end], *rest)
        return None

    parts = search(0, 0)
    if parts is None:
        return None
    return {
        piece: part.decode("utf-8", "surrogateescape")
        for piece, part in zip(pieces, parts, strict=True)
        if isinstance(piece, str) and piece != "*"
    }


@st.composite
def spellings(draw: st.DrawFn) -> list[str]:
    """The pieces of a pattern with up to four captures, the path only at the end."""
    plain = st.sampled_from(["*", "*", *CLASSES, *LITERALS, ":", ":", "a"])
    found = draw(st.lists(plain, max_size=6))
    for capture in ["{x}", "{y}", "{z}"][: draw(st.integers(0, 3))]:
        found.insert(draw(st.integers(0, len(found))), capture)
    return [*found, "{p:path}"] if draw(st.booleans()) else found or ["a"]


@settings(max_examples=600)
@given(spellings(), seeds)
@example(["{x}", "{y}"], random.Random(1))
@example(["{x}", "{p:path}"], random.Random(1))
@example(["{p:path}"], random.Random(1))
@example(["*", "{p:path}"], random.Random(1))
@example(["a", "*", "{x}", "*", "a"], random.Random(1))
def test_captures(spelled: list[str], rng: random.Random) -> None:
    """Captures are those of the leftmost-shortest split; no match means that there is none."""
    pattern, pieces = Pattern("".join(spelled)), pieces_of(spelled)
    names = {b"", b":", b"a", b"::", b"a:", b":a", b"a::b", b"a:b", b"a:b:", b"ab:ab:ab"}
    for _ in range(8):
        names |= {inside := word(pattern.tokens, rng, b"ab:\xc3"), mutant(inside, rng, b"ab:")}
    for name in names:
        expected = reference(pieces, name) if name else None
        assert pattern.match(name) == expected, (pattern, name)
    assert pattern.captures == tuple(s[1] for s in spelled if s[0] == "{" and s != "{{")


def test_captures_exhaustively(say: Say) -> None:
    """All rows of up to three pieces split all names of up to five bytes as brute force does."""
    parts, cases = ["{x}", "{y}", "*", "?", "a", ":"], 0
    names = [bytes(n) for k in range(1, 6) for n in itertools.product(b"a:b", repeat=k)]
    rows = [list(row) for n in (1, 2, 3) for row in itertools.product(parts, repeat=n)]
    for spelled in [*rows, *([*row, "{p:path}"] for row in rows if len(row) < 3), ["{p:path}"]]:
        if any(spelled.count(capture) > 1 for capture in ("{x}", "{y}")):
            continue
        pattern, pieces = Pattern("".join(spelled)), pieces_of(spelled)
        for name in names:
            assert pattern.match(name) == reference(pieces, name), (pattern, name)
            cases += 1
    say(f"captures against all splits: {cases:,} pairs of a pattern and a name")


@pytest.mark.parametrize(
    "text, name, captures",
    [
        ("chat:{room}", "chat:a", {"room": "a"}),
        ("chat:{room}", "chat:", None),
        ("chat:{room}", "chat:a:b", None),
        ("{a}:{b}", "x:y", {"a": "x", "b": "y"}),
        ("{a}{b}", "xyz", {"a": "x", "b": "yz"}),
        ("{a}-{b}", "x-y-z", {"a": "x", "b": "y-z"}),
        ("{a}*", "xyz", {"a": "x"}),
        ("*{a}", "x:yz", {"a": "yz"}),
        ("*{a}", "xyz", {"a": "xyz"}),
        ("f:{p:path}", "f:a:b", {"p": "a:b"}),
        ("f:{p:path}", "f:a::b", None),
        ("f:{p:path}", "f::a", None),
        ("f:{p:path}", "f:a:", None),
        ("{a}{p:path}", "xy:z", {"a": "x", "p": "y:z"}),
        ("{a}:{p:path}", "x::z", None),
        ("{{{a}}}", "{x}", {"a": "x"}),
        ("\\{{a}", "{x", {"a": "x"}),
        ("{größe}", "é", {"größe": "é"}),
        ("{a}", "\udcff", {"a": "\udcff"}),
        ("*", "a:b", {}),
        ("*b", "a:b", {}),
        ("a*b", "ab", {}),
        ("a*a", "a", None),
    ],
)
def test_capture_table(text: str, name: str, captures: dict[str, str] | None) -> None:
    """The examples of the documentation hold."""
    assert Pattern(text).match(encode_name(name)) == captures


# -- Coverage --------------------------------------------------------------------------------------


@cache
def kinds(sets: frozenset[int]) -> tuple[int, ...]:
    """One byte for each way of being in these sets."""
    return tuple({tuple(each >> byte & 1 for each in sets): byte for byte in ANY_BYTE}.values())


def decide(a: Tokens, b: Tokens) -> bool:
    """Whether each non-empty name of `b` is one of `a`: both run side by side as sets of places."""
    alphabet = kinds(frozenset(token for token in (*a, *b) if token >= 0))

    def close(row: Tokens, places: Iterable[int]) -> frozenset[int]:
        found = set(places)
        for place in range(len(row)):
            if place in found and row[place] < 0:
                found.add(place + 1)
        return frozenset(found)

    def step(row: Tokens, places: frozenset[int], byte: int) -> frozenset[int]:
        stay = {p for p in places if p < len(row) and row[p] < 0}
        move = {p + 1 for p in places if p < len(row) and row[p] >= 0 and row[p] >> byte & 1}
        return close(row, stay | move)

    todo = [(close(a, [0]), close(b, [0]))]
    seen = set()
    while todo:
        of_a, of_b = todo.pop()
        for byte in alphabet:
            pair = step(a, of_a, byte), step(b, of_b, byte)
            if pair in seen or not pair[1]:
                continue
            if len(b) in pair[1] and len(a) not in pair[0]:
                return False
            seen.add(pair)
            todo.append(pair)
    return True


def glob(text: str) -> Tokens:
    """The tokens of a glob that is written as text."""
    return tokenize(text.encode())


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ("*", "*", True),
        ("*", "?*", True),
        ("?*", "*", True),
        ("*", "*x*", True),
        ("*", "x", True),
        ("*", "*:x", True),
        ("**", "*a", True),
        ("x", "*", False),
        ("chat:*", "chat:*", True),
        ("chat:*", "chat:room", True),
        ("chat:*", "chat:", True),
        ("chat:*", "chat", False),
        ("chat:*", "chat:*:x", True),
        ("chat:?*", "chat:*x*", True),
        ("chat:?*", "chat:*", False),
        ("chat:*:x", "chat:*", False),
        ("*a*", "*a*a*", True),
        ("*a*a*", "*a*", False),
        ("*ab", "*aab", True),
        ("*?", "*", True),
        ("*?a", "*a", False),
        ("?*?", "??", True),
        ("??*", "?*?", True),
        ("[ab]", "a", True),
        ("[ab]", "[abc]", False),
        ("[^a]*", "b*", True),
        ("[^a]*", "[^ab]*", True),
        ("*[ab]*", "*a*", True),
        ("*a[ab]*", "*aa*", True),
        ("a", "[]", True),
        ("[]", "a", False),
        ("[]", "[]", True),
        ("*a[^a]*", "a*b", True),  # each name has a last a, and something other after it
        ("*a[^a]*", "*a*b*", True),
        ("*[^a]b*", "[^a]*b", False),  # ca…ab
    ],
)
def test_cover_table(a: str, b: str, expected: bool) -> None:
    """The covers that a reader would find by thinking are found, and no others."""
    assert covers(glob(a), glob(b)) == expected == decide(glob(a), glob(b))


def test_covers_is_complete_for_literals_and_stars(say: Say) -> None:
    """Among all globs of up to five of `a`, `b` and `*`, `covers` is inclusion itself."""
    rows = [glob("".join(r)) for n in range(1, 6) for r in itertools.product("ab*", repeat=n)]
    held = 0
    for a, b in itertools.product(rows, repeat=2):
        if len(a) + len(b) < 9:
            held += (found := covers(a, b))
            assert found == decide(a, b), (a, b)
    say(f"covers, literals and stars, exhaustively: {held:,} inclusions, all found, none invented")


PARTS = ["*", "*", "?", "a", "b", ":", "[ab]", "[^a]", "[a-c]", "[^ab]", "[:b]"]
SMALLER = {  # what may stand for a part so that the whole language only shrinks
    "*": ["*", "*", "", "a", "b:", "?", "?*", "*?", "*a*", "[ab]", "*[ab]*", "[^a]*"],
    "?": ["?", "a", ":", "[ab]", "[^a]", "[a-c]"],
    "[ab]": ["[ab]", "a", "b"],
    "[^a]": ["[^a]", "b", ":", "[^ab]", "[:b]"],
    "[a-c]": ["[a-c]", "[ab]", "c"],
    "[^ab]": ["[^ab]", ":", "c", "[^abc]"],
    "[:b]": ["[:b]", ":", "b"],
}


def test_covers_finds_specialisations(say: Say) -> None:
    """Of globs and their specialisations at least 85 % are recognised."""
    rng = random.Random(2)
    found = total = 0
    for _ in range(3000):
        parts = rng.choices(PARTS, k=rng.randint(1, 7))
        smaller = "".join(rng.choice(SMALLER.get(part, [part])) for part in parts)
        a, b = glob("".join(parts)), glob(smaller)
        if not smaller:
            continue
        assert decide(a, b), (parts, smaller)
        total += 1
        found += covers(a, b)
    say(f"covers, specialisations: {found:,} of {total:,} inclusions found ({found / total:.1%})")
    assert found / total >= 0.85


def test_covers_of_strangers(say: Say) -> None:
    """Of two unrelated globs, `covers` says inclusion only where there is one."""
    rng = random.Random(3)
    found = true = 0
    for _ in range(4000):
        a, b = (glob("".join(rng.choices(PARTS, k=rng.randint(1, 6)))) for _ in "ab")
        true += (truth := decide(a, b))
        found += (claim := covers(a, b))
        assert truth or not claim, (a, b)
    say(f"covers, 4,000 unrelated pairs: {found:,} of {true:,} inclusions found, none invented")
    assert found >= 0.85 * true


@settings(max_examples=300)
@given(raw_globs, raw_globs, st.booleans(), seeds)
def test_covers_is_sound(a: bytes, b: bytes, related: bool, rng: random.Random) -> None:
    """Where `a` covers `b`, no name of `b`'s language escapes `a`, whatever bytes they hold."""
    mine = tokenize(a)
    theirs = tokenize(a.replace(b"*", b, 1) if related else b)
    if covers(mine, theirs):
        for _ in range(20):
            if (name := word(theirs, rng)) and glob_matches(theirs, name):
                assert glob_matches(mine, name), (a, b, name)


@settings(max_examples=300)
@given(spellings(), st.integers(0, 3))
def test_covers_takes_captures_as_stars(spelled: list[str], extra: int) -> None:
    """A pattern's own wire form covers it, and more stars change nothing."""
    pattern = Pattern("".join(spelled))
    wire = tokenize(pattern.wire)
    assert covers(wire, pattern.tokens)
    assert covers(pattern.tokens, wire)
    wider = wire + (STAR,) * extra
    assert covers(pattern.tokens, wider) == decide(wire, wider)


def test_covers_gives_up_on_giants() -> None:
    """Too many ways to read a pattern end in "no", which is safe, and not in a long search."""
    assert covers(glob("?" * 12 + "*"), glob("*" + "a" * 12))
    assert not covers(glob("?" * 40 + "*"), glob("*" + "a" * 40))
    assert decide(glob("?" * 40 + "*"), glob("*" + "a" * 40))


def test_covers_is_never_slow(say: Say) -> None:
    """The work for two patterns of 60 bytes is bounded, however they are made."""
    rng = random.Random(4)
    worst, most = 0.0, 0
    mixed = PARTS + list(string.ascii_lowercase)
    hard = [("*a" * 30, "*aa" * 20), ("*[ab]" * 12, "*[bc]" * 12), ("*a?" * 20, "*" + "ab" * 29)]
    hard += [("*a" + "?" * 58, "*" + "a" * 59), ("*[ab]?[^a]" * 6, "*?[a-c]*[^b]" * 5)]
    hard += [
        ("".join(rng.choices(mixed, k=30))[:60], "".join(rng.choices(mixed, k=30))[:60])
        for _ in range(200)
    ]
    for a, b in hard:
        call = partial(covers, glob(a), glob(b))
        worst = max(worst, seconds_of(call))
        most = max(most, lines_of(call))
    say(f"covers, 60 bytes each: at worst {worst * 1e3:.2f} ms, {most:,} lines executed")
    assert most < 20_000


# -- No pattern is slow ----------------------------------------------------------------------------


def lines_of(call: Callable[[], object]) -> int:
    """How many lines of Python a call executes."""
    count = 0

    def trace(frame: object, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def most_lines(tokens: Tokens) -> int:
    """What a match may execute: so much per token, and nothing that depends on the stars."""
    return 12 * len(tokens) + 100


def seconds_of(call: Callable[[], object]) -> float:
    """What a call takes, undisturbed: the best of three, with all tables cold."""
    found = []
    for _ in range(3):
        _table.cache_clear()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


BAD = [
    "*a*a*a*a*a*a*a*b",
    "*a" * 29 + "*b",
    "{a}{b}*x",
    "{a}{b}{c}{d}{e}*{f}*{g}*x*{p:path}",
    "*" * 59 + "x",
    "*?" * 29 + "*b",
    "*[ab]" * 11 + "*c",
    "*" + string.ascii_letters + "12345*",
    "*[^a][^b][^c][^d][^e][^f][^g][^h][^i][^j][^k][^l][^m][^n]*",
    "?" * 60,
    "a" * 60,
    "*a" * 30,
]
SLOW_NAMES = [b"a" * 512, b"ab" * 256, b"a:" * 255 + b"a", string.ascii_letters.encode() * 9, b"a"]


def test_no_pattern_is_slow(say: Say) -> None:
    """A match executes a number of lines that grows with the tokens alone, not with their stars."""
    rng = random.Random(5)
    parts = ["*", "*", "?", "a", "b", ":", "[ab]"]
    made = ["".join(rng.choices(parts, k=60))[:60] for _ in range(60)]
    made += ["{a}{b}" + text[:54] for text in made[:30]]
    worst, where = 0.0, ""
    for text in BAD + made:
        pattern = Pattern(text)
        for name in SLOW_NAMES:
            call = partial(pattern.match, name)
            worst, where = max((worst, where), (seconds_of(call), text))
            assert lines_of(call) <= most_lines(pattern.tokens)
            plain = tokenize(pattern.wire)
            assert lines_of(partial(glob_matches, plain, name)) <= most_lines(plain)
    say(f"match, 60 bytes on up to 512: at worst {worst * 1e3:.2f} ms, tables cold ({where!r})")


@settings(max_examples=200)
@given(st.lists(capture_pieces, min_size=1, max_size=40), seeds)
def test_work_is_linear(pieces: list[str], rng: random.Random) -> None:
    """Any pattern of up to 60 bytes is matched in a few lines of Python per token."""
    (pattern, *_), short = parsed(["".join(dict.fromkeys(pieces)), "*"]), "".join(pieces)[:60]
    for candidate in (pattern, *parsed([short])):
        for name in (word(candidate.tokens, rng, b"ab") * 3, b"ab" * 256):
            assert lines_of(partial(candidate.match, name)) <= most_lines(candidate.tokens)


# -- Patterns as values ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, wire, literal, prefix, suffix, captures",
    [
        ("a:b", b"a:b", b"a:b", b"a:b", b"", ()),
        ("a\\*b", b"a\\*b", b"a*b", b"a*b", b"", ()),
        ("a{{b}}", b"a{b}", b"a{b}", b"a{b}", b"", ()),
        ("[a]", b"[a]", b"a", b"a", b"", ()),
        ("a*", b"a*", None, b"a", b"", ()),
        ("a*b:", b"a*b:", None, b"a", b"b:", ()),
        ("*a*b", b"*a*b", None, b"", b"b", ()),
        ("a:{x}:b", b"a:*:b", None, b"a:", b":b", ("x",)),
        ("{x}{y:path}", b"**", None, b"", b"", ("x", "y")),
        ("a?", b"a?", None, b"a", b"", ()),
        ("[]", b"[]", None, b"", b"", ()),
        ("a\\", b"a\\", b"a\\", b"a\\", b"", ()),
        ("é", b"\xc3\xa9", b"\xc3\xa9", b"\xc3\xa9", b"", ()),
        ("[{x}]", b"[{x}]", None, b"", b"", ()),
        ("[{x}", b"[{x}", None, b"", b"", ()),
    ],
)
def test_fields(
    text: str,
    wire: bytes,
    literal: bytes | None,
    prefix: bytes,
    suffix: bytes,
    captures: tuple[str, ...],
) -> None:
    """A pattern knows its wire form, its literal ends, and its captures."""
    pattern = Pattern(text)
    assert (pattern.text, pattern.wire, pattern.literal) == (text, wire, literal)
    assert (pattern.prefix, pattern.suffix, pattern.captures) == (prefix, suffix, captures)


def test_equality() -> None:
    """Patterns with one text are one pattern, and nothing else equals a pattern."""
    assert {Pattern("a*"), Pattern("a*"), Pattern("a**")} == {Pattern("a**"), Pattern("a*")}
    assert Pattern("a*") != "a*"
    assert repr(Pattern("é*")) == "Pattern('\\xe9*')"


def test_literal_prefix() -> None:
    """The literal prefix ends at the first token that is not one byte, an empty set included."""
    assert literal_prefix(tokenize(b"ab*")) == b"ab"
    assert literal_prefix(tokenize(b"a[]b")) == b"a"
    assert literal_prefix(tokenize(b"[ab]")) == b""
    assert literal_prefix(()) == b""


def test_an_empty_rest() -> None:
    """A star takes the empty rest of a name; nothing else does."""
    assert glob_matches((STAR,), b"")
    assert glob_matches((STAR, STAR), b"")
    assert glob_matches((), b"")
    assert not glob_matches((ANY,), b"")
    assert _align((PATH,), b"") is None
    assert _align((SEGMENT,), b"") is None
    assert Pattern("*").match(b"") is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "pattern '' is empty"),
        ("a\nb", "pattern 'a\\nb' has a control character"),
        ("a\x00", "pattern 'a\\x00' has a control character"),
        ("a\x85", "pattern 'a\\x85' has a control character"),
        ("a\ud800", "pattern 'a\\ud800' has a lone surrogate, which has no UTF-8 form"),
        ("{", "pattern '{' has a brace that is not closed; a literal brace is written {{"),
        ("a}", "pattern 'a}' closes a brace that was not opened; write }} for a literal"),
        ("{}", "pattern '{}' has a capture '' that is not a Python name"),
        ("{1}", "pattern '{1}' has a capture '1' that is not a Python name"),
        ("{a b}", "pattern '{a b}' has a capture 'a b' that is not a Python name"),
        ("{a:int}", "pattern '{a:int}' has a capture of kind 'int'; the only kind is path"),
        ("{a}{a}", "pattern '{a}{a}' repeats the capture 'a'"),
        ("{a}{a:path}", "pattern '{a}{a:path}' repeats the capture 'a'"),
        ("{a:path}x", "pattern '{a:path}x' goes on after {a:path}, which must come last"),
        ("[é]", "pattern '[\\xe9]' has non-ASCII inside brackets, where Redis sees bytes"),
        ("[a-é", "pattern '[a-\\xe9' has non-ASCII inside brackets, where Redis sees bytes"),
        ("x" * 513, "is 513 bytes long, over the 512 that are allowed"),
        ("é" * 257, "is 514 bytes long, over the 512 that are allowed"),
        ("*" * 513, "is 513 bytes long, over the 512 that are allowed"),
    ],
)
def test_invalid_pattern(text: str, message: str) -> None:
    """What is no pattern is refused with its text and what is wrong with it."""
    with pytest.raises(InvalidPattern) as raised:
        Pattern(text)
    assert str(raised.value).endswith(message)
    assert str(raised.value).startswith("pattern '")
    assert len(str(raised.value)) < 300
    assert raised.value.pattern == text


def test_the_limit_is_on_the_wire() -> None:
    """512 bytes are counted as they travel, without a literal's escapes and the capture names."""
    assert Pattern(escape("*" * 512)).literal == b"*" * 512
    assert Pattern("{" + "x" * 600 + "}").wire == b"*"
    assert Pattern("{{" * 512).literal == b"{" * 512
    assert Pattern("a" * 511 + "*").wire == b"a" * 511 + b"*"
    with pytest.raises(InvalidPattern, match="is 601 bytes long"):
        Pattern(escape("*" * 300) + "*")


@given(st.lists(st.sampled_from([*"{}[]:ab*\\é\udc80\x00", "path"]), max_size=12).map("".join))
def test_parsing_ends_well(text: str) -> None:
    """Every text is a pattern or is refused as one."""
    for pattern in parsed([text]):
        assert len(pattern.wire) <= len(encode_name(text))
        assert pattern.match(b"a") in (None, {}) or pattern.captures


# -- Names -----------------------------------------------------------------------------------------


@given(st.binary(max_size=20))
def test_any_bytes_are_a_name(name: bytes) -> None:
    """Every byte string has a text that comes back as the same bytes."""
    assert encode_name(decode_name(name)) == name


@given(
    st.text(
        alphabet=st.characters() | st.sampled_from("\udc80\udcc3\udca9\udcff\ud800"), max_size=9
    )
)
def test_a_channel_comes_back_as_it_was(name: str) -> None:
    """A name that is accepted is the text that subscribers see."""
    try:
        wire = check_channel(name)
    except InvalidChannel:
        return
    assert decode_name(wire) == name
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", decode_name(wire))


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "channel '' is empty"),
        ("a\x1fb", "channel 'a\\x1fb' has a control character"),
        ("\x7f", "channel '\\x7f' has a control character"),
        ("\x9f", "channel '\\x9f' has a control character"),
        ("\udc7f", "channel '\\udc7f' has a lone surrogate, which has no UTF-8 form"),
        (
            "\udcc2\udc85",
            "spells UTF-8 in surrogate escapes, and would come back as other text",
        ),
        ("é" * 256 + "x", "is 513 bytes long, over the 512 that are allowed"),
    ],
)
def test_invalid_channel(name: str, message: str) -> None:
    """What is no channel is refused with its name and what is wrong with it."""
    with pytest.raises(InvalidChannel) as raised:
        check_channel(name)
    assert str(raised.value).endswith(message)
    assert len(str(raised.value)) < 300
    assert raised.value.channel == name


def test_channels() -> None:
    """Channels may hold glob characters, any non-ASCII, bytes that are no UTF-8, and 512 bytes."""
    assert check_channel("a*[?]\\{x}") == b"a*[?]\\{x}"
    assert check_channel("é\udcff") == b"\xc3\xa9\xff"
    assert check_channel("x" * MAX_NAME) == b"x" * 512
    assert check_channel("a", "ns:") == b"ns:a"
    assert check_channel("\xa0 ") == b"\xc2\xa0 "
    assert oversize(b"x" * 512) is None


def test_the_prefix_counts() -> None:
    """A namespace counts toward the 512 bytes, and the error names the channel without it."""
    with pytest.raises(InvalidChannel, match="is 513 bytes long") as raised:
        check_channel("x" * 510, "ns:")
    assert raised.value.channel == "x" * 510


def test_a_channel_is_text() -> None:
    """Bytes are refused with a sentence."""
    with pytest.raises(InvalidChannel, match="a channel is a str, not bytes"):
        check_channel(b"chat")  # type: ignore[arg-type]


def test_escape_table() -> None:
    """Escaping touches the characters of the pattern language and nothing else."""
    assert escape("*?[]\\{}") == "\\*\\?\\[\\]\\\\{{}}"
    assert escape("a:b-^é") == "a:b-^é"


# -- Templates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, values, channel",
    [
        ("chat:{room}", {"room": "a"}, "chat:a"),
        ("chat:{room}", {"room": "*"}, "chat:*"),
        ("{a}:{b}", {"a": "1", "b": "2"}, "1:2"),
        ("{b}{a}", {"a": "1", "b": "2"}, "21"),
        ("f:{p:path}", {"p": "a:b"}, "f:a:b"),
        ("news", {}, "news"),
        ("{{{a}}}", {"a": "x"}, "{x}"),
        ("*[{a}]\\", {"a": "x"}, "*[x]\\"),
        ("a}}{{b", {}, "a}{b"),
    ],
)
def test_template(text: str, values: dict[str, str], channel: str) -> None:
    """A template renders a channel that its own pattern matches with the same values."""
    template = Template(text)
    assert template.text == text
    assert template.render(values) == channel
    assert template.pattern.match(channel.encode()) == {
        name: values[name] for name in template.fields
    }


@given(st.dictionaries(st.sampled_from(["a", "b", "p"]), st.text(alphabet="x:*é", max_size=4)))
def test_a_value_cannot_escape(values: dict[str, str]) -> None:
    """Whatever the values, a rendered channel reads back as these values, or is refused."""
    values = {"a": "x", "b": "x", "p": "x", **values}
    template = Template("c:{a}:{b}:{p:path}")
    try:
        channel = template.render(values)
    except InvalidChannel:
        assert not all(values["p"].split(":")) or {*"ab"} & {
            n for n in "ab" if not values[n] or ":" in values[n]
        }
    else:
        assert template.pattern.match(channel.encode()) == values


@pytest.mark.parametrize(
    "text, value, message",
    [
        ("c:{a}", "", "must be not empty and without ':', and is ''"),
        ("c:{a}", "x:y", "must be not empty and without ':', and is 'x:y'"),
        ("c:{a:path}", "", "must have no empty segment, and is ''"),
        ("c:{a:path}", "x::y", "must have no empty segment, and is 'x::y'"),
    ],
)
def test_a_bad_value(text: str, value: str, message: str) -> None:
    """A value that would leave its place is refused, naming field, template and rule."""
    with pytest.raises(InvalidChannel) as raised:
        Template(text).render({"a": value})
    assert f"field 'a' of the channel template {text!a} must " in str(raised.value)
    assert raised.value.channel == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("a{", "template 'a{' has a lone brace; a literal one is doubled"),
        ("a}", "template 'a}' has a lone brace; a literal one is doubled"),
        ("{a{b}", "template '{a{b}' has a lone brace; a literal one is doubled"),
        ("", "template '': pattern '' is empty"),
        ("{a}{a}", "template '{a}{a}': pattern '{a}{a}' repeats the capture 'a'"),
        ("{1}", "template '{1}': pattern '{1}' has a capture '1' that is not a Python name"),
        ("{a:path}:b", "goes on after {a:path}, which must come last"),
        ("x" * 513, "is 513 bytes long, over the 512 that are allowed"),
    ],
)
def test_invalid_template(text: str, message: str) -> None:
    """What is no template is refused as an invalid pattern that names the template's own text."""
    with pytest.raises(InvalidPattern) as raised:
        Template(text)
    assert str(raised.value).endswith(message)
    assert raised.value.pattern == text
