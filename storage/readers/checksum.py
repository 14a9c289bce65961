"""CRC-32C of something from those of its parts, so that parts can be read and checked by several threads.

A checksum is a polynomial over GF(2) modulo P; appending n bytes multiplies it by x^(8n) (M. Adler's combination in
zlib, for this polynomial). Polynomials are kept reflected, as CRC-32C is: the bit of x^0 is the highest.
"""

from functools import lru_cache

__all__ = ["appended"]

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31


def appended(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32C of two parts after one another, from that of each and the length of the second."""
    return _product(_power(second_bytes), first) ^ second


def _product(a: int, b: int) -> int:
    """Return a times b modulo P."""
    found = 0
    bit = _ONE
    while a:
        if a & bit:
            found ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return found


@lru_cache(maxsize=1024)
def _power(count: int) -> int:
    """Return x^(8 count) modulo P, by squaring."""
    found, square = _ONE, 1 << 23  # x^0 and x^8
    while count:
        if count & 1:
            found = _product(square, found)
        square = _product(square, square)
        count >>= 1
    return found
