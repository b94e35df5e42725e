"""The index of globs: it may name too many candidates, never too few."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from eventbus import _patterns
from eventbus._index import Index, Shape, glob_shape, name_shape
from eventbus._patterns import glob_matches

globs = (
    st.text("ab*?[]\\:", min_size=1, max_size=7)
    .map(str.encode)
    .filter(lambda glob: glob_shape(glob).start != glob_shape(glob).hay)  # that would be a name
)
names = st.text("ab:*", min_size=1, max_size=7).map(str.encode)
Key = tuple[bool, bytes]
keys = st.one_of(st.tuples(st.just(True), globs), st.tuples(st.just(False), names))


def shape_of(key: Key) -> Shape:
    """The shape of a glob (True) or of a name."""
    return glob_shape(key[1]) if key[0] else name_shape(key[1])


def index_of(found: set[Key]) -> Index[Key]:
    """An index with these keys."""
    index: Index[Key] = Index()
    for key in found:
        index.add(key, shape_of(key))
    return index


def test_shape() -> None:
    """A shape holds the literal start and end of a glob, its longest inner run, and all runs."""
    _, *literal = glob_shape(rb"ab*c?de\*f[x]*gh")
    assert literal == [b"ab", b"gh", b"de*fx", b"ab\0c\0de*fx\0gh"]
    assert glob_shape(b"*")[1:] == (b"", b"", b"", b"\0")
    assert name_shape(b"ab")[1:] == (b"ab", b"ab", b"", b"ab")
    assert glob_shape(rb"a\b")[1:] == name_shape(b"ab")[1:]


@given(st.sets(keys, max_size=12), names)
def test_no_match_is_missed(found: set[Key], name: bytes) -> None:
    """Everything that matches a name is among the candidates for it."""
    matching = {key for key in found if shape_of(key).matches(name)}
    assert matching == {
        key
        for key in found
        if (glob_matches(shape_of(key).tokens, name) if key[0] else key[1] == name)
    }
    candidates = list(index_of(found).above(name, name, name))
    assert len(candidates) == len(set(candidates))
    assert matching <= set(candidates) <= found


@given(st.sets(keys, max_size=12), keys)
def test_no_cover_is_missed(found: set[Key], other: Key) -> None:
    """Everything that covers a shape, or that it covers, is among the candidates."""
    shape, index = shape_of(other), index_of(found)
    above = set(index.above(shape.start, shape.end, shape.hay))
    below = set(index.below(shape))
    for key in found:
        mine = shape_of(key)
        if 0 in mine.tokens or 0 in shape.tokens:  # matches nothing, so anything may cover it
            continue
        assert mine.covers(shape) == _patterns.covers(mine.tokens, shape.tokens)
        assert key in above or not mine.covers(shape)
        assert key in below or not shape.covers(mine)


@given(st.sets(keys, max_size=12))
def test_nothing_is_kept(found: set[Key]) -> None:
    """An index from which all was removed is like a new one."""
    index = index_of(found)
    for key in found:
        index.remove(key, shape_of(key))
    assert vars(index) == vars(Index())
