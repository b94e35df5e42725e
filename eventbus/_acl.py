"""The ACL rules that a bus needs, and no more: words for ``ACL SETUSER name on >password ...``.

Redis compares the pattern of a PSUBSCRIBE with the rules *literally*, so every pattern is listed,
those that another one covers too: the bus falls back on them when the wide one is denied. The
channel of a PUBLISH or SUBSCRIBE must match a rule as a glob. Pure; only patterns may enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from eventbus._errors import InvalidPattern
from eventbus._patterns import Pattern, decode_name

_NOTHING = ("resetkeys", "resetchannels", "-@all")


class Acl(NamedTuple):
    """The least rules by role. One bus connects as one user, who needs `both`."""

    publisher: tuple[str, ...]
    subscriber: tuple[str, ...]
    both: tuple[str, ...]


def acl_of(
    listens: Sequence[Pattern],
    publishes: Sequence[Pattern],
    *,
    prefix: str,
    internal: str | None,
    connecting: Sequence[str],
) -> Acl:
    """The rules. `prefix` goes before every name; `internal` is the glob of the bus's own channels,
    None when it has none; `connecting` are the rules that opening a connection needs.

    Raises InvalidPattern for a pattern that no rule can name.
    """
    talk = ("+publish",)
    hear = ["+subscribe", "+unsubscribe"]
    if any(pattern.literal is None for pattern in listens):
        hear += ["+psubscribe", "+punsubscribe"]
    always = ("+ping", *connecting)
    own = () if internal is None else (internal,)
    said = [*(_rule(prefix, pattern) for pattern in publishes), *own]
    heard = [*(_rule(prefix, pattern) for pattern in listens), *own]
    return Acl(
        publisher=_words(talk, always, said),
        subscriber=_words(hear, always, heard),
        both=_words(talk, hear, always, said, heard),
    )


def _words(*groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*_NOTHING, *(word for group in groups for word in group)]))


def _rule(prefix: str, pattern: Pattern) -> str:
    rule = f"&{prefix}{decode_name(pattern.wire)}"
    if any(character.isspace() or character == "\0" for character in rule):
        raise InvalidPattern(
            f"Redis has no ACL rule for {pattern.text!a}: rules cannot hold spaces"
        )
    return rule
