"""Singer sets: every residue is a difference exactly once."""

from itertools import takewhile

import pytest

from cqsa_stream.schedulers.quorums import neighbours, quorum, quorum_size, singer_numbers, singer_set

SINGER = list(takewhile(lambda c: c <= 10_303, singer_numbers()))


def test_the_numbers_are_those_of_prime_powers() -> None:
    assert SINGER[:11] == [7, 13, 21, 31, 57, 73, 91, 133, 183, 273, 307]
    assert SINGER[-1] == 101**2 + 101 + 1


@pytest.mark.parametrize("c", SINGER)
def test_every_difference_occurs_once(c: int) -> None:
    members = singer_set(c)
    differences = sorted((a - b) % c for a in members for b in members if a != b)
    assert differences == list(range(1, c))
    assert len(members) == quorum_size(c)
    assert members[:2] == (0, 1)


@pytest.mark.parametrize("c", [n for n in SINGER if n <= 307])
def test_two_chunks_share_one_quorum(c: int) -> None:
    met = {(a, b) for i in range(c) for a in quorum(c, i) for b in quorum(c, i)}
    assert len(met) == c * c
    assert all(quorum(c, i)[0] == i for i in range(c))


@pytest.mark.parametrize(
    ("c", "below", "above"), [(8, 7, 13), (20, 13, 21), (43, 31, 57), (3, None, 7), (307, 273, 381)]
)
def test_another_number_names_its_neighbours(c: int, below: int | None, above: int) -> None:
    assert neighbours(c) == (below, above)
    if c != 307:
        with pytest.raises(ValueError, match=f"not a Singer number.*{above}"):
            quorum_size(c)
