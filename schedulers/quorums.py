"""Perfect difference sets of Singer, and the cyclic quorums made of them.

A set ``D`` of ``k = q + 1`` residues modulo ``c = q^2 + q + 1`` is a perfect difference set when every non-zero residue
is the difference of exactly one ordered pair of its elements. The quorums ``S_i = {(i + d) mod c : d in D}`` then hold
every two distinct chunks together in exactly one quorum. Source: J. Singer, "A theorem in finite projective geometry
and some applications to number theory", Trans. AMS 43 (1938); their use for attention: arXiv 2604.20819.
"""

from collections.abc import Iterator
from functools import cache
from itertools import count, product

__all__ = ["neighbours", "quorum", "quorum_size", "singer_numbers", "singer_set"]


def singer_numbers() -> Iterator[int]:
    """Yield 7, 13, 21, 31, 57, ...: ``q^2 + q + 1`` for every prime power q, without end."""
    return (q * q + q + 1 for q in count(2) if _prime_power(q))


def quorum_size(c: int) -> int:
    """Return k, the chunks in one quorum out of c chunks. Raises ValueError where c is no Singer number."""
    q = round(((4 * c - 3) ** 0.5 - 1) / 2) if c > 0 else 0
    if q < 2 or q * q + q + 1 != c or not _prime_power(q):
        below, above = neighbours(c)
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{c} chunks: not a Singer number (q^2 + q + 1, q a prime power); the nearest: {near}")
    return q + 1


def neighbours(c: int) -> tuple[int | None, int]:
    """Return the largest Singer number below c (None where there is none) and the smallest above it."""
    below = None
    for number in singer_numbers():
        if number > c:
            return below, number
        if number < c:
            below = number
    raise AssertionError("prime powers have no end")


def quorum(c: int, i: int) -> tuple[int, ...]:
    """Return the chunks of quorum ``S_i``, chunk i (the one whose diagonal pair it owns) first."""
    return tuple((i + d) % c for d in singer_set(c))


@cache
def singer_set(c: int) -> tuple[int, ...]:
    """Return a perfect difference set modulo c, sorted, holding 0 and 1.

    The powers of a generator x of GF(q^3), taken modulo GF(q), are the c points of the projective plane; those on one
    line (no x^2 term) have exponents that form the set.
    """
    q = quorum_size(c) - 1
    field = _Field(q)
    cubic = _projective_generator(field, c)
    power, exponents = (1, 0, 0), []
    for exponent in range(c):
        if power[2] == 0:
            exponents.append(exponent)
        power = field.times_x(power, cubic)
    assert len(exponents) == q + 1, "a line of a projective plane has q + 1 points"
    members = set(exponents)
    shift = next(d for d in exponents if (d + 1) % c in members)
    return tuple(sorted((d - shift) % c for d in exponents))


def _projective_generator(field: "_Field", c: int) -> tuple[int, int, int]:
    """Return (a0, a1, a2) such that x, where x^3 = a0 + a1 x + a2 x^2, has order c modulo the scalars."""
    exponents = [c // p for p in _prime_factors(c)]
    for a2, a1, a0 in product(range(field.q), range(field.q), range(1, field.q)):
        cubic = (a0, a1, a2)
        if field.is_scalar(field.power_of_x(c, cubic)) and not any(
            field.is_scalar(field.power_of_x(e, cubic)) for e in exponents
        ):
            return cubic
    raise AssertionError("GF(q^3) has a primitive element")


class _Field:
    """GF(q), q = p^m, by tables; and products of polynomials over it modulo a cubic.

    An element is an int whose base-p digits are the coefficients of a polynomial over GF(p).
    """

    def __init__(self, q: int) -> None:
        power = _prime_power(q)
        assert power is not None
        self.q, (self.p, self.m) = q, power
        self.exp = self._powers_of_a_generator()
        self.log = {element: exponent for exponent, element in enumerate(self.exp)}
        self.sums = self._addition_table() if self.m > 1 and self.p > 2 else []

    def add(self, a: int, b: int) -> int:
        if self.m == 1:
            return (a + b) % self.p
        if self.p == 2:
            return a ^ b
        return self.sums[a][b]

    def mul(self, a: int, b: int) -> int:
        if a == 0 or b == 0:
            return 0
        return self.exp[(self.log[a] + self.log[b]) % (self.q - 1)]

    def times_x(self, a: tuple[int, int, int], cubic: tuple[int, int, int]) -> tuple[int, int, int]:
        high = a[2]
        if high == 0:
            return (0, a[0], a[1])
        return (
            self.mul(high, cubic[0]),
            self.add(a[0], self.mul(high, cubic[1])),
            self.add(a[1], self.mul(high, cubic[2])),
        )

    def multiply(
        self, a: tuple[int, int, int], b: tuple[int, int, int], cubic: tuple[int, int, int]
    ) -> tuple[int, int, int]:
        total, shifted = (0, 0, 0), a
        for digit in b:
            total = tuple(self.add(t, self.mul(digit, s)) for t, s in zip(total, shifted, strict=True))  # type: ignore[assignment]
            shifted = self.times_x(shifted, cubic)
        return total

    def power_of_x(self, exponent: int, cubic: tuple[int, int, int]) -> tuple[int, int, int]:
        result, base = (1, 0, 0), (0, 1, 0)
        while exponent:
            if exponent & 1:
                result = self.multiply(result, base, cubic)
            base = self.multiply(base, base, cubic)
            exponent >>= 1
        return result

    @staticmethod
    def is_scalar(a: tuple[int, int, int]) -> bool:
        return a[1] == 0 and a[2] == 0

    def _digits(self, element: int) -> list[int]:
        digits = []
        for _ in range(self.m):
            element, digit = divmod(element, self.p)
            digits.append(digit)
        return digits

    def _addition_table(self) -> list[list[int]]:
        """Return a + b for all pairs, grown digit by digit."""
        p, table = self.p, [[0]]
        for _ in range(self.m):
            size = len(table)
            table = [
                [table[a % size][b % size] + size * ((a // size + b // size) % p) for b in range(p * size)]
                for a in range(p * size)
            ]
        return table

    def _powers_of_a_generator(self) -> list[int]:
        """Return g^0 .. g^(q-2): g is the first primitive root (m = 1) or x modulo the first primitive polynomial."""
        candidates = range(1, self.q)
        for candidate in candidates:
            powers = self._orbit(candidate)
            if len(powers) == self.q - 1:
                return powers
        raise AssertionError("the units of a finite field are cyclic")

    def _orbit(self, candidate: int) -> list[int]:
        powers, element = [1], self._step(1, candidate)
        while element != 1 and element != 0 and len(powers) < self.q:
            powers.append(element)
            element = self._step(element, candidate)
        return powers

    def _step(self, element: int, candidate: int) -> int:
        """Multiply by the candidate (m = 1), or by x modulo x^m = the candidate's digits."""
        if self.m == 1:
            return element * candidate % self.p
        digits = self._digits(element)
        high, digits = digits[-1], [0, *digits[:-1]]
        return _from_digits(
            [(d + high * t) % self.p for d, t in zip(digits, self._digits(candidate), strict=True)], self.p
        )


def _from_digits(digits: list[int], p: int) -> int:
    return sum(digit * p**i for i, digit in enumerate(digits))


def _prime_factors(n: int) -> list[int]:
    factors, p = [], 2
    while p * p <= n:
        if n % p == 0:
            factors.append(p)
            while n % p == 0:
                n //= p
        p += 1
    return [*factors, n] if n > 1 else factors


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, m) with q = p^m, or None."""
    factors = _prime_factors(q)
    if len(factors) != 1:
        return None
    p, m = factors[0], 0
    while q > 1:
        q, m = q // p, m + 1
    return p, m
