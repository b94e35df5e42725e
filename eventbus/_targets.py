"""What the frames of one channel have in common, worked out once per channel and type.

Only what follows from the routes may enter; a change of the routes throws all of it away.
"""

from __future__ import annotations

from collections.abc import Sequence

from eventbus._codec import Reader
from eventbus._envelope import is_plain
from eventbus._lanes import Target
from eventbus._patterns import decode_name

_MAX_TYPES = 64
"""Types that are remembered per channel."""
_MAX_TYPE = 512
"""Bytes of a type that is remembered."""


class Choice:
    """Who gets the messages of one type on one channel, and who skips them. `only`: exactly one
    gets them and nobody skips them. `odd`: the type is not what its bytes say."""

    __slots__ = ("odd", "only", "skipped", "targets")

    def __init__(self, targets: Sequence[Target], type: bytes) -> None:
        self.targets = tuple(target for target in targets if target.wants(type))
        self.skipped = tuple(target.lane for target in targets if not target.wants(type))
        self.odd = not is_plain(type)
        self.only: tuple[Target, Reader | None] | None = None
        if len(self.targets) == 1 and not self.skipped:
            self.only = (self.targets[0], self.targets[0].lane.body.reader_for(type))


class Channel:
    """What the frames of one channel, through one subscription, have in common. `first`: this copy
    of a message is the one that counts."""

    __slots__ = ("by_type", "first", "key", "name", "targets")

    def __init__(self, key: bytes, targets: Sequence[Target], first: bool) -> None:
        self.key = key
        self.name = decode_name(key)
        self.targets = targets
        self.first = first
        self.by_type: dict[bytes, Choice] = {}

    def choose(self, type: bytes) -> Choice:
        """Work out who wants this type, and remember it."""
        if len(type) > _MAX_TYPE:
            return Choice(self.targets, type)
        if len(self.by_type) >= _MAX_TYPES:
            self.by_type.clear()
        choice = self.by_type[type] = Choice(self.targets, type)
        return choice
