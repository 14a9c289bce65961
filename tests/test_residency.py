"""What stays in memory: never more than there are slots, never a slot that may still be read, and Belady's choice."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqsa_stream.schedulers.residency import Residency, Standing, pieces
from cqsa_stream.schedulers.tasks import NEVER

uses = st.lists(st.integers(0, 9), max_size=60)


def next_uses(order: list[int]) -> list[int]:
    return [next((j for j in range(i + 1, len(order)) if order[j] == key), NEVER) for i, key in enumerate(order)]


def misses(order: list[int], slots: int, window: int) -> int:
    residency = Residency(slots, window)
    return sum(not residency.place(key, later).present for key, later in zip(order, next_uses(order), strict=True))


def least_misses(order: list[int], slots: int) -> int:
    """The fewest misses that any choice could have, by trying all."""

    @cache
    def from_here(place: int, held: frozenset[int]) -> int:
        if place == len(order):
            return 0
        key = order[place]
        if key in held:
            return from_here(place + 1, held)
        if len(held) < slots:
            return 1 + from_here(place + 1, held | {key})
        return 1 + min(from_here(place + 1, held - {out} | {key}) for out in held)

    return from_here(0, frozenset())


@given(st.lists(st.integers(0, 5), max_size=14), st.integers(1, 4))
def test_without_a_window_nobody_does_better(order: list[int], slots: int) -> None:
    assert misses(order, slots, 0) == least_misses(order, slots)


@given(uses, st.integers(1, 14), st.integers(0, 13))
def test_slots_hold_what_was_placed_and_recent_ones_stay(order: list[int], slots: int, window: int) -> None:
    window = min(window, slots - 1)
    residency = Residency(slots, window)
    held: dict[int, int] = {}
    recent: list[int] = []
    for key, later in zip(order, next_uses(order), strict=True):
        slot, present, evicted, _ = residency.place(key, later)
        assert evicted is None or evicted == held.get(slot)
        assert 0 <= slot < slots
        assert present == (held.get(slot) == key)
        if not present:
            assert key not in held.values(), "what stands in a slot is found there"
            assert slot not in recent[-window:] or not window
        held[slot] = key
        recent.append(slot)


@given(uses, uses, st.integers(2, 14))
def test_after_forgetting_all_is_as_if_new(before: list[int], order: list[int], slots: int) -> None:
    residency = Residency(slots, 1)
    for key, later in zip(before, next_uses(before), strict=True):
        residency.place(key, later)
    residency.forget()
    found = sum(not residency.place(key, later).present for key, later in zip(order, next_uses(order), strict=True))
    assert abs(found - misses(order, slots, 1)) <= 1, "but for the slot that may still be read"


def test_a_ring_is_slots_with_the_longest_window() -> None:
    residency = Residency(3, 2)
    assert [residency.place(i, NEVER).slot for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_many_slots_are_kept_in_order() -> None:
    order = [i % 40 for i in range(4000)]
    found = misses(order, 30, 2)
    assert found == pytest.approx(40 + 99 * (40 - 29), rel=0.05), "a cycle of 40 through 30 slots"


def test_pieces_cut_a_range() -> None:
    assert list(pieces(range(3, 10), 3)) == [range(3, 6), range(6, 9), range(9, 10)]
    assert list(pieces(range(0), 3)) == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=60), st.integers(3, 6), st.integers(0, 4))
def test_partials_stand_in_one_place_each(uses: list[tuple[int, int]], resident: int, parked: int) -> None:
    """Whatever is brought: a place holds one partial; what leaves memory is named; those of the task stay."""
    standing = Standing(resident, parked)
    device: dict[int, int] = {}
    host: dict[int, int] = {}
    task: list[int] = []
    for number, (chunk, later) in enumerate(uses):
        task = [*task, chunk][-2:] if number % 3 else [chunk]
        brought = standing.bring(chunk, later, task)
        assert brought.present == (device.get(brought.slot) == chunk)
        if brought.evicted is not None:
            assert device.pop(brought.slot) == brought.evicted
            assert brought.evicted not in task
            if brought.stored not in (None, brought.evicted):
                [place] = [place for place, held in host.items() if held == brought.stored]
                del host[place]
            if brought.parked_at is not None:
                assert brought.parked_at not in host
                host[brought.parked_at] = brought.evicted
            else:
                assert brought.stored == brought.evicted
        if brought.parked is not None:
            assert host.pop(brought.parked) == chunk
        assert chunk not in host.values()
        device[brought.slot] = chunk
        assert set(task) <= set(device.values())
        assert len(set(device.values()) | set(host.values())) == len(device) + len(host)


def test_a_partial_that_is_taken_out_leaves_its_place_when_it_is_free() -> None:
    standing = Standing(2, 0)
    slots = [standing.bring(chunk, chunk, ()).slot for chunk in (1, 2)]
    out = standing.device.remove(1)
    assert out == slots[0]
    assert standing.device.full
    assert standing.bring(3, 3, ()).slot == slots[1], "a place that is still leaving is not filled"
    standing.device.free(out)
    assert not standing.device.full
    assert standing.bring(4, 4, ()).slot == slots[0]
