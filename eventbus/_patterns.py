"""The language of names: channels, patterns with captures, and channel templates.

A pattern is Redis's own glob (`stringmatchlen` in Redis's src/util.c), byte for byte, plus braces:
``{name}`` is one non-empty segment without ``:``, ``{name:path}`` is one or more such segments at
the end. The server sees ``*`` for both; the stricter rule is applied here.

Theory of operation. A glob is a row of tokens, each a set of bytes that takes one byte, or a star.
A set is an int with one bit per byte value. Matching runs all alignments at once: the state is an
int with one bit per *remaining length* of the name, so a token costs two or three operations on one
small integer, whatever the pattern (no pattern can be slow). The same idea decides `covers`.

Pure: no I/O, no clock. Only what is true of names alone may enter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from itertools import takewhile
from operator import and_, or_

from eventbus._errors import InvalidChannel, InvalidPattern

MAX_NAME = 512
"""Bytes of a name on the wire. Redis takes more; a longer one is nearly always a mistake, and every
PUBLISH walks every pattern on the server."""

STAR, SEGMENT, PATH = -1, -2, -3
"""Tokens that are not sets: `*`, `{x}`, `{x:path}`."""

ANY = (1 << 256) - 1
_BACKSLASH, _STAR, _QUESTION, _OPEN, _CLOSE, _CARET, _DASH = b"\\*?[]^-"
_LEFT, _RIGHT, _COLON = b"{}:"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_SPECIAL = re.compile(r"[*?\[\]\\]")
_NOT_COLON = ANY ^ (1 << _COLON)


def encode_name(name: str) -> bytes:
    """A name as bytes. Bytes that are no UTF-8 travel as surrogate escapes (PEP 383).

    Raises UnicodeEncodeError for other lone surrogates.
    """
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    """The inverse of `encode_name`, for every byte string."""
    return name.decode("utf-8", "surrogateescape")


def flaw(name: str) -> str | None:
    """What makes this text unfit as a name, or None. The length is judged by `oversize`."""
    if not name:
        return "is empty"
    if _CONTROL.search(name):
        return "has a control character"
    try:
        same = name.isascii() or decode_name(encode_name(name)) == name
    except UnicodeEncodeError:
        return "has a lone surrogate, which has no UTF-8 form"
    return None if same else "spells UTF-8 in surrogate escapes, and would come back as other text"


def oversize(wire: bytes) -> str | None:
    """What makes these bytes too long for a name, or None."""
    if len(wire) <= MAX_NAME:
        return None
    return f"is {len(wire)} bytes long, over the {MAX_NAME} that are allowed"


def check_channel(name: str, prefix: str = "") -> bytes:
    """The bytes of a channel on the wire, after a fit `prefix`. Raises InvalidChannel."""
    if not isinstance(name, str):
        raise InvalidChannel(f"a channel is a str, not {type(name).__name__}")
    problem = flaw(name)
    wire = b"" if problem else encode_name(prefix + name)
    if problem := problem or oversize(wire):
        raise InvalidChannel(f"channel {name!a:.200} {problem}", channel=name)
    return wire


def escape(text: str) -> str:
    r"""`text` as a pattern that matches exactly `text`: escapes ``* ? [ ] \ { }``.

    For building patterns from user input: ``bus.on(f"chat:{escape(room)}:*")``.
    """
    return _SPECIAL.sub(r"\\\g<0>", text).replace("{", "{{").replace("}", "}}")


def _class(glob: bytes, i: int) -> tuple[int, int]:
    """The set that the class starting after the bracket at `glob[i - 1]` stands for, and its end.

    Redis's own oddities: an unclosed class is a class, `[]` is empty, `[^]` is any byte, a reversed
    range is turned round, `[a-]` is a range up to the bracket.
    """
    size = len(glob)
    negated = i < size and glob[i] == _CARET
    i += negated
    found = 0
    while i < size:
        byte = glob[i]
        if byte == _BACKSLASH and i + 1 < size:
            i += 1
            found |= 1 << glob[i]
        elif byte == _CLOSE:
            i += 1
            break
        elif i + 2 < size and glob[i + 1] == _DASH:
            low, high = sorted((byte, glob[i + 2]))
            found |= (1 << (high + 1)) - (1 << low)
            i += 2
        else:
            found |= 1 << byte
        i += 1
    return (ANY ^ found if negated else found), i


def _token(glob: bytes, i: int) -> tuple[int, int]:
    """The token at `glob[i]`, and the index after it."""
    byte = glob[i]
    if byte == _STAR:
        return STAR, i + 1
    if byte == _QUESTION:
        return ANY, i + 1
    if byte == _OPEN:
        return _class(glob, i + 1)
    if byte == _BACKSLASH and i + 1 < len(glob):
        return 1 << glob[i + 1], i + 2
    return 1 << byte, i + 1


def tokenize(glob: bytes) -> tuple[int, ...]:
    """The tokens of a plain Redis glob (no braces)."""
    tokens, i = [], 0
    while i < len(glob):
        token, i = _token(glob, i)
        tokens.append(token)
    return tuple(tokens)


def literal_prefix(tokens: tuple[int, ...]) -> bytes:
    """The bytes of the tokens before the first that is not a single byte."""
    single = takewhile(lambda token: token > 0 and token.bit_count() == 1, tokens)
    return bytes(token.bit_length() - 1 for token in single)


@lru_cache(maxsize=4096)
def _table(token: int) -> bytes:
    """A translation table: byte to ``1`` where the set has it, else ``0``."""
    return f"{token:0256b}"[::-1].encode()


def _path_lengths(name: bytes) -> int:
    """Bit j is set when the last j bytes of `name` are one or more non-empty segments."""
    if name.endswith(b":"):
        return 0
    allowed = (1 << (len(name) - name.rfind(b"::"))) - 1
    return (int(name.translate(_table(_NOT_COLON)), 2) << 1) & allowed


def _align(tokens: tuple[int, ...], name: bytes) -> list[int] | None:
    """Per token boundary, the remaining lengths from which the rest of the tokens match.

    Bit j of entry i: the last j bytes of `name` match `tokens[i:]`. None when nothing matches.
    """
    size = len(name)
    full = (2 << size) - 1
    runs = int(name.translate(_table(_NOT_COLON)) or b"0", 2)
    state = 1
    states = [state]
    for token in reversed(tokens):
        if token >= 0:
            state = (state & int(name.translate(_table(token)) or b"0", 2)) << 1
        elif token == STAR:
            state = full & -(state & -state)
        elif token == SEGMENT:
            # One byte of a run without colons, then as many more of the run as there are: the
            # addition carries each start through its whole run (Cameron's parallel MatchStar).
            start = (state & runs) << 1
            state = ((((start & runs) + runs) ^ runs) | start) & full
        else:
            state = _path_lengths(name) if name else 0
        if not state:
            return None
        states.append(state)
    states.reverse()
    return states if states[0] >> size & 1 else None


def glob_matches(tokens: tuple[int, ...], name: bytes) -> bool:
    """Whether a plain glob, as tokens, matches the whole of `name`, a channel or the rest of one.

    A star takes an empty rest; the empty channel, which it does not take in Redis, is never asked.
    """
    return tokens == (STAR,) or _align(tokens, name) is not None


def _walk(tokens: tuple[int, ...], states: list[int], name: bytes) -> list[bytes]:
    """The captured bytes of the leftmost-shortest match, in order."""
    size = left = len(name)
    found = []
    for token, rest in zip(tokens, states[1:], strict=True):
        if token >= 0:
            left -= 1
            continue
        reach = left if token == STAR else left - 1
        after = (rest & ((2 << reach) - 1)).bit_length() - 1
        if token != STAR:
            found.append(name[size - left : size - after])
        left = after
    return found


class Pattern:
    """What a handler listens to, parsed. Make one with `Pattern(text)`; equal texts are equal.

    `wire` is the glob for the server; `literal` the one channel when there is nothing to match,
    else None; `prefix` and `suffix` the literal bytes before the first and after the last wildcard;
    `captures` the names in the braces.
    Raises InvalidPattern, naming the pattern and what is wrong with it.
    """

    __slots__ = ("captures", "literal", "prefix", "suffix", "text", "tokens", "wire", "_middle")

    def __init__(self, text: str) -> None:
        if problem := flaw(text):
            raise InvalidPattern(f"pattern {text!a:.200} {problem}", pattern=text)
        self.text = text
        self.tokens, self.wire, self.captures = _parse(text)
        self.prefix = literal_prefix(self.tokens)
        fixed = len(self.prefix)
        self.literal = self.prefix if fixed == len(self.tokens) else None
        self.suffix = literal_prefix(self.tokens[fixed:][::-1])[::-1]
        self._middle = self.tokens[fixed : len(self.tokens) - len(self.suffix)]
        if problem := oversize(self.wire if self.literal is None else self.literal):
            raise InvalidPattern(f"pattern {text!a:.200} {problem}", pattern=text)

    def match(self, name: bytes) -> dict[str, str] | None:
        """The captures when this pattern, captures included, matches the channel; else None."""
        start, end = len(self.prefix), len(name) - len(self.suffix)
        if not (name and start <= end and name.startswith(self.prefix)):
            return None
        if not name.endswith(self.suffix):
            return None
        middle = self._middle
        rest = name[start:end]
        if len(middle) == 1 and middle[0] < 0:  # `chat:*` and `chat:{room}`: nearly every pattern
            if middle[0] == STAR:
                return {}
            if not rest or (
                b":" in rest
                if middle[0] == SEGMENT
                else b"::" in rest or rest.startswith(b":") or rest.endswith(b":")
            ):
                return None
            return {self.captures[0]: decode_name(rest)}
        states = _align(middle, rest)
        if states is None:
            return None
        found = _walk(middle, states, rest) if self.captures else []
        return dict(zip(self.captures, map(decode_name, found), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Pattern({self.text!a})"


def _capture(text: bytes, i: int) -> tuple[str, bool, int]:
    """The capture that opens at `text[i]`: its name, whether it is a path, and its end."""
    end = text.find(b"}", i)
    if end < 0:
        raise InvalidPattern("has a brace that is not closed; a literal brace is written {{")
    name, colon, kind = text[i + 1 : end].decode("utf-8", "replace").partition(":")
    if not name.isidentifier():
        raise InvalidPattern(f"has a capture {name!a} that is not a Python name")
    if colon and kind != "path":
        raise InvalidPattern(f"has a capture of kind {kind!a}; the only kind is path")
    return name, kind == "path", end + 1


def _parse(text: str) -> tuple[tuple[int, ...], bytes, tuple[str, ...]]:
    """Tokens, wire glob and capture names of a pattern's text."""
    source = encode_name(text)
    tokens: list[int] = []
    captures: list[str] = []
    wire = bytearray()
    i = 0
    try:
        while i < len(source):
            byte = source[i]
            if byte in (_LEFT, _RIGHT) and source[i + 1 : i + 2] == source[i : i + 1]:
                tokens.append(1 << byte)
                wire.append(byte)
                i += 2
            elif byte == _RIGHT:
                raise InvalidPattern("closes a brace that was not opened; write }} for a literal")
            elif byte == _LEFT:
                name, path, i = _capture(source, i)
                if name in captures:
                    raise InvalidPattern(f"repeats the capture {name!a}")
                if path and i != len(source):
                    raise InvalidPattern(
                        f"goes on after {{{ascii(name)[1:-1]}:path}}, which must come last"
                    )
                captures.append(name)
                tokens.append(PATH if path else SEGMENT)
                wire += b"*"
            else:
                token, end = _token(source, i)
                if byte == _OPEN and not source[i:end].isascii():
                    raise InvalidPattern("has non-ASCII inside brackets, where Redis sees bytes")
                tokens.append(token)
                wire += source[i:end]
                i = end
    except InvalidPattern as error:
        raise InvalidPattern(f"pattern {text!a:.200} {error}", pattern=text) from None
    return tuple(tokens), bytes(wire), tuple(captures)


@lru_cache(maxsize=16384)
def _normal(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The same language with one spelling: captures as stars, and in each run the star last."""
    row: list[int] = []
    star = False
    for token in tokens:
        if star and 0 <= token < ANY:
            row.append(STAR)
            star = False
        if token < 0:
            star = True
        else:
            row.append(token)
    if star:
        row.append(STAR)
    return tuple(row)


def _least(states: Iterable[int]) -> frozenset[int]:
    """The states that include no other; when these are too many, the one state that all include."""
    distinct = set(states)
    if len(distinct) > 1:
        distinct = {s for s in distinct if not any(o & ~s == 0 for o in distinct if o != s)}
    return frozenset(distinct if len(distinct) <= 16 else [reduce(and_, distinct)])


def covers(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether every channel that the glob `b` matches is matched by the glob `a` too.

    Takes the tokens of both. Never wrongly True; wrongly False only where `_least` gives up. `a`
    runs as an automaton over the tokens of `b`. A state has bit i when `a[i:]` is what is left, and
    there is one for each way to read `b`. Only the least count: larger ones accept what they do.
    """
    a, b = _normal(a), _normal(b)
    head = () if a == (ANY, STAR) else a[:-1]  # a channel is never empty: `?*` is `*`
    if 0 in b or (a[-1:] == (STAR,) and STAR not in head and head == b[: len(head)]):
        return True  # a set without bytes matches nothing; `x*` is nearly every cover
    where: dict[int, int] = {}  # each distinct set of `a`, and its places
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | 1 << i
    stars, anywhere = where.pop(STAR, 0), where.pop(ANY, 0)
    known = reduce(or_, where, 0)
    steps: dict[int, frozenset[int]] = {}

    def read(states: Iterable[int], token: int) -> Iterator[int]:
        if token not in steps:
            parts = {token: anywhere}  # the set in parts, and the places in `a` that take each
            for mine, there in () if token & ~known else where.items():
                inside = {part & mine: mask | there for part, mask in parts.items() if part & mine}
                parts = {p & ~mine: mask for p, mask in parts.items() if p & ~mine} | inside
            steps[token] = _least(parts.values())
        for state in states:
            for step in steps[token]:
                moved = state & stars | (state & step) << 1
                yield moved | (moved & stars) << 1

    states = frozenset([1 | (stars & 1) << 1])
    for token in b:
        if token != STAR:
            states = _least(read(states, token))
        else:
            while states != (more := _least([*states, *read(states, ANY)])):
                states = more
        if 0 in states:
            return False
    return all(state >> len(a) & 1 for state in states)


class Template:
    """A channel with fields in it, as an event class declares it: ``chat:{room}``.

    `fields` maps each field name to whether it is a path. Everything outside braces is literal.
    Raises InvalidPattern when the text is not a template.
    """

    __slots__ = ("fields", "pattern", "text", "_parts")

    def __init__(self, text: str) -> None:
        parts: list[str] = [""]
        names: list[str] = []
        for piece in re.split(r"(\{\{|\}\}|\{[^{}]*\})", text):
            if piece in ("{{", "}}"):
                parts[-1] += piece[0]
            elif piece.startswith("{") and piece.endswith("}"):
                names.append(piece)
                parts.append("")
            else:
                if "{" in piece or "}" in piece:
                    raise InvalidPattern(
                        f"template {text!a:.200} has a lone brace; a literal one is doubled",
                        pattern=text,
                    )
                parts[-1] += piece
        spelled = escape(parts[0]) + "".join(
            name + escape(part) for name, part in zip(names, parts[1:], strict=True)
        )
        try:
            self.pattern = Pattern(spelled)
        except InvalidPattern as error:
            raise InvalidPattern(f"template {text!a:.200}: {error}", pattern=text) from None
        self.text = text
        paths = (token == PATH for token in self.pattern.tokens if token < 0)
        self.fields = dict(zip(self.pattern.captures, paths, strict=True))
        self._parts = parts

    def render(self, values: Mapping[str, str]) -> str:
        """The channel with these values in it. Raises InvalidChannel for a value that would escape.

        A segment must not be empty or hold ``:``; a path must not have an empty segment.
        """
        pieces = [self._parts[0]]
        for (name, path), part in zip(self.fields.items(), self._parts[1:], strict=True):
            value = values[name]
            if not all(value.split(":")) if path else not value or ":" in value:
                rule = "have no empty segment" if path else "be not empty and without ':'"
                raise InvalidChannel(
                    f"field {name!r} of the channel template {self.text!a} must {rule},"
                    f" and is {ascii(value)[:80]}",
                    channel=self.text,
                )
            pieces += (value, part)
        return "".join(pieces)
