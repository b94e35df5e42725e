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
from collections.abc import Mapping
from functools import lru_cache

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
    """What makes this text unfit as a name, or None."""
    if not name:
        return "is empty"
    if _CONTROL.search(name):
        return "has a control character"
    try:
        size = len(encode_name(name))
    except UnicodeEncodeError:
        return "has a lone surrogate, which has no UTF-8 form"
    return (
        f"is {size} bytes long, over the {MAX_NAME} that are allowed" if size > MAX_NAME else None
    )


def check_channel(name: str, prefix: str = "") -> bytes:
    """The bytes of a channel on the wire, `prefix` first. Raises InvalidChannel."""
    if not isinstance(name, str):
        raise InvalidChannel(f"a channel is a str, not {type(name).__name__}")
    if problem := flaw(name) or flaw(prefix + name):
        raise InvalidChannel(f"channel {name!a} {problem}", channel=name)
    return encode_name(prefix + name)


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
    found = bytearray()
    for token in tokens:
        if token <= 0 or token.bit_count() != 1:
            break
        found.append(token.bit_length() - 1)
    return bytes(found)


@lru_cache(maxsize=4096)
def _table(token: int) -> bytes:
    """A translation table: byte to ``1`` where the set has it, else ``0``."""
    return bytes(48 + (token >> byte & 1) for byte in range(256))


def _path_lengths(name: bytes) -> int:
    """Bit j is set when the last j bytes of `name` are one or more non-empty segments."""
    if name.endswith(b":"):
        return 0
    allowed = (1 << (len(name) - name.rfind(b"::") - 1 + 1)) - 1
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
    """Whether a plain glob, as tokens, matches the whole of `name`."""
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

    `wire` is the glob for the server; `literal` the one channel when there is nothing to match, else
    None; `prefix` the literal bytes before the first wildcard; `captures` the names in the braces.
    Raises InvalidPattern, naming the pattern and what is wrong with it.
    """

    __slots__ = ("captures", "literal", "prefix", "suffix", "text", "tokens", "wire", "_middle")

    text: str
    captures: tuple[str, ...]
    wire: bytes
    literal: bytes | None
    prefix: bytes
    suffix: bytes
    tokens: tuple[int, ...]
    _middle: tuple[int, ...]

    def __init__(self, text: str) -> None:
        if problem := flaw(text):
            raise InvalidPattern(f"pattern {text!a} {problem}", pattern=text)
        tokens, wire, captures = _parse(text)
        self.text = text
        self.captures = captures
        self.wire = wire
        self.tokens = tokens
        self.prefix = literal_prefix(tokens)
        fixed = len(self.prefix)
        self.literal = self.prefix if fixed == len(tokens) else None
        self.suffix = literal_prefix(tokens[fixed:][::-1])[::-1]
        self._middle = tokens[fixed : len(tokens) - len(self.suffix)]

    def match(self, name: bytes) -> dict[str, str] | None:
        """The captures when this pattern, captures included, matches the channel; else None."""
        start, end = len(self.prefix), len(name) - len(self.suffix)
        if start > end or not name.startswith(self.prefix) or not name.endswith(self.suffix):
            return None
        middle = self._middle
        rest = name[start:end]
        if len(middle) == 1 and middle[0] < 0:  # `chat:*` and `chat:{room}`: nearly every pattern
            if middle[0] == STAR:
                return {} if name else None
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
        if not self.captures:
            return {}
        found = _walk(middle, states, rest)
        return dict(zip(self.captures, map(decode_name, found), strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Pattern({self.text!a})"


def _capture(text: bytes, i: int) -> tuple[str, bool, int]:
    """The capture that opens at `text[i]`: its name, whether it is a path, and the index after it."""
    end = text.find(b"}", i)
    if end < 0:
        raise InvalidPattern("has a brace that is not closed; a literal brace is written {{")
    name, _, kind = text[i + 1 : end].decode("utf-8", "replace").partition(":")
    if not name.isidentifier():
        raise InvalidPattern(f"has a capture {name!a} that is not a Python name")
    if kind not in ("", "path"):
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
                    raise InvalidPattern(f"repeats the capture {name!r}")
                if path and i != len(source):
                    raise InvalidPattern(f"goes on after {{{name}:path}}, which must come last")
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
        raise InvalidPattern(f"pattern {text!a} {error}", pattern=text) from None
    return tuple(tokens), bytes(wire), tuple(captures)


@lru_cache(maxsize=16384)
def _normal(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The same language with one spelling: captures as stars, and in each run the star last.

    A name is never empty, so a lone star is one byte and a star.
    """
    row: list[int] = []
    star = False
    for token in tokens:
        if token < 0:
            star = True
        elif token == ANY:
            row.append(token)
        else:
            if star:
                row.append(STAR)
                star = False
            row.append(token)
    if star:
        row.append(STAR)
    return (ANY, STAR) if row == [STAR] else tuple(row)


def covers(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether every channel that the glob `b` matches is matched by the glob `a` too.

    Never wrongly True; complete for literals and `*`. Takes the tokens of both.
    `a` runs as an automaton over the tokens of `b`: a set needs a set that includes it, or a star;
    a star needs a star.
    """
    a, b = _normal(a), _normal(b)
    if 0 in b:
        return True
    stars = sum(1 << i for i, token in enumerate(a) if token == STAR)
    includes: dict[int, int] = {}
    state = 1 | (stars & 1) << 1
    for token in b:
        if token == STAR:
            state &= stars
        else:
            if token not in includes:
                includes[token] = sum(
                    1 << i for i, mine in enumerate(a) if mine >= 0 and not token & ~mine
                )
            state = (state & stars) | (state & includes[token]) << 1
        state |= (state & stars) << 1
        if not state:
            return False
    return bool(state >> len(a) & 1)


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
                        f"template {text!a} has a lone brace; a literal one is doubled",
                        pattern=text,
                    )
                parts[-1] += piece
        spelled = escape(parts[0]) + "".join(
            name + escape(part) for name, part in zip(names, parts[1:], strict=True)
        )
        self.text = text
        self.pattern = Pattern(spelled)
        self.fields = {
            name: token == PATH
            for name, token in zip(
                self.pattern.captures,
                (token for token in self.pattern.tokens if token in (SEGMENT, PATH)),
                strict=True,
            )
        }
        self._parts = parts

    def render(self, values: Mapping[str, str]) -> str:
        """The channel with these values in it. Raises InvalidChannel for a value that would escape.

        A segment must not be empty or hold ``:``; a path must not have an empty segment.
        """
        pieces = [self._parts[0]]
        for (name, path), part in zip(self.fields.items(), self._parts[1:], strict=True):
            value = values[name]
            if not all(value.split(":")) if path else not value or ":" in value:
                rule = "no empty segment" if path else "not empty and without ':'"
                raise InvalidChannel(
                    f"field {name!r} of the channel template {self.text!a} must be {rule},"
                    f" and is {ascii(value)[:80]}",
                    channel=self.text,
                )
            pieces += (value, part)
        return "".join(pieces)
