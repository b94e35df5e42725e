"""The numbers that make loss visible, in and out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus._sequences import LIMIT, Inbound, Outbound


def test_numbers_count_from_one() -> None:
    """Each channel has numbers of its own, from 1, without a hole."""
    outbound = Outbound()
    assert [outbound.take(c) for c in (b"a", b"b", b"a", b"a", b"b")] == [1, 1, 2, 3, 2]


def test_outbound_forgets_what_is_not_in_use() -> None:
    """Over its limit a sender forgets channels not used for long, which begin anew; one in use
    stays, and never more than the limit are remembered."""
    outbound = Outbound(limit=4)
    for n in range(1, 20):
        assert outbound.take(b"used") == n
        assert outbound.take(b"other %d" % n) == 1
        assert len(outbound._young) + len(outbound._old) <= 4
    assert outbound.take(b"other 1") == 1


@pytest.mark.parametrize(
    "numbers, missing",
    [
        ([1, 2, 3], [0, 0, 0]),
        ([7, 8], [0, 0]),  # first sight in the middle of a stream
        ([1, 5], [0, 3]),
        ([3, 4, 10, 11], [0, 0, 5, 0]),
        ([5, 1, 2], [0, 0, 0]),  # the sender began anew
        ([5, 5, 6], [0, 0, 0]),  # a repetition is no loss
        ([5, 3, 6], [0, 0, 2]),  # an older one is the new baseline
        ([0, 1, 2], [0, 0, 0]),
        ([-5, 1], [0, 0]),
    ],
)
def test_holes(numbers: list[int], missing: list[int]) -> None:
    """A hole counts exactly; 1, a first sight and what is not greater are a new baseline."""
    inbound = Inbound()
    assert [inbound.hear(b"c", b"s", number) for number in numbers] == missing


def test_sources_and_channels_are_apart() -> None:
    """Each source has its own numbers on each channel."""
    inbound = Inbound()
    for channel, source, number in [(b"c", b"s", 1), (b"c", b"t", 5), (b"d", b"s", 9)]:
        assert inbound.hear(channel, source, number) == 0
    assert inbound.hear(b"c", b"s", 3) == 1
    assert inbound.hear(b"c", b"t", 7) == 1
    assert inbound.hear(b"d", b"s", 11) == 1
    assert len(inbound) == 3


def test_inbound_forgets_what_is_not_heard_any_more() -> None:
    """Over its limit a receiver forgets pairs not heard for long: first sight again, no gap; one
    that goes on being heard stays exact, and so does one of very many sources of one channel."""
    inbound = Inbound(limit=8)
    for n in range(1, 40):
        assert inbound.hear(b"c", b"s", 2 * n) == (n > 1)
        assert inbound.hear(b"c", b"t%d" % n, 7) == 0
        assert inbound.hear(b"d%d" % n, b"s", 7) == 0
        assert len(inbound) <= 8
    assert inbound.hear(b"c", b"t1", 9) == 0


def test_forget_dead_channels() -> None:
    """Dead channels under the prefix are forgotten with all their sources, and only these."""
    inbound = Inbound()
    for channel in (b"a:1", b"a:2", b"b:1"):
        inbound.hear(channel, b"s", 1)
    inbound.hear(b"a:1", b"t", 1)
    assert inbound.forget(b"a:", lambda channel: False) == 0
    assert inbound.forget(b"a:", lambda channel: channel == b"a:1") == 1
    assert len(inbound) == 2
    assert inbound.hear(b"a:1", b"s", 9) == 0
    assert inbound.hear(b"a:2", b"s", 9) == 7
    assert inbound.forget(b"", lambda channel: True) == 3
    assert len(inbound) == 0


def test_forget_one_channel() -> None:
    """A literal subscription's channel is forgotten with all its sources, known or not."""
    inbound = Inbound()
    inbound.hear(b"a", b"s", 1)
    inbound.hear(b"a", b"t", 1)
    inbound.hear(b"ab", b"s", 1)
    inbound.forget_channel(b"a")
    inbound.forget_channel(b"unknown")
    assert len(inbound) == 1
    assert inbound.hear(b"a", b"s", 9) == 0
    assert inbound.hear(b"ab", b"s", 9) == 7


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.booleans()), max_size=80))
def test_what_is_lost_is_what_is_counted(sends: list[tuple[bytes, bool]]) -> None:
    """Between the first and the last that arrive, the count is the number that did not."""
    outbound, inbound = Outbound(), Inbound()
    counted = dict.fromkeys((b"a", b"b", b"c"), 0)
    numbers: dict[bytes, list[int]] = {channel: [] for channel in counted}
    for channel, arrives in sends:
        number = outbound.take(channel)
        if arrives:
            counted[channel] += inbound.hear(channel, b"s", number)
            numbers[channel].append(number)
    for channel, heard in numbers.items():
        span = heard[-1] - heard[0] + 1 if heard else 0
        assert counted[channel] == span - len(heard)


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 2), st.sampled_from("hear forget one".split()))
    ),
    st.integers(1, 4),
)
def test_inbound_stays_consistent(steps: list[tuple[int, int, str]], limit: int) -> None:
    """Whatever happens, the bound holds, and the count of the young generation is right."""
    inbound = Inbound(limit)
    for i, (c, s, step) in enumerate(steps):
        channel, source = b"c%d" % c, b"s%d" % s
        if step == "hear":
            assert inbound.hear(channel, source, i + 1) >= 0
        elif step == "forget":
            inbound.forget(b"c", lambda name, dead=channel: name == dead)  # type: ignore[misc]
        else:
            inbound.forget_channel(channel)
        assert len(inbound) <= max(2, limit)
        assert inbound._count == sum(map(len, inbound._young.values()))
        assert all(inbound._old.values())


def test_the_default_limit() -> None:
    """65,536 are remembered unless said otherwise."""
    outbound = Outbound()
    for number in range(LIMIT):
        outbound.take(b"%d" % number)
    assert len(outbound._old) + len(outbound._young) == LIMIT == 65_536


def test_an_announced_number_is_compared_and_remembered() -> None:
    """What a source says was its last number is a loss where more is known to be missing, a
    baseline where nothing is known, and nothing on a channel that is not heard."""

    def announced(channel: bytes, number: int, hears: bool = True) -> int:
        return inbound.announced(
            channel, b"s", number, everything=False, hears=lambda channel: hears
        )

    inbound = Inbound()
    inbound.hear(b"c", b"s", 3)
    assert announced(b"c", 5) == 2
    assert announced(b"c", 5) == announced(b"c", 4) == 0
    assert announced(b"d", 9) == 0
    assert inbound.hear(b"d", b"s", 11) == 1
    assert announced(b"e", 9, hears=False) == 0
    inbound.firsts = {}
    inbound.hear(b"f", b"s", 3)
    assert inbound.announced(b"f", b"s", 4, everything=True, hears=bool) == 1 + 2
    assert inbound.announced(b"g", b"s", 4, everything=True, hears=bool) == 4
    assert len(inbound) == 4


def test_what_came_before_the_first_one_has_a_bound() -> None:
    """The oldest of too many beginnings is forgotten."""
    inbound = Inbound(limit=4)
    inbound.firsts = {}
    for n in range(3):
        inbound.hear(b"c%d" % n, b"s", 5)
    assert list(inbound.firsts.values()) == [4, 4]
