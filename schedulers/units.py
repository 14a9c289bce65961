"""How sizes, rates and times are written, and read from what users write. Pure text.

Sizes are shown in powers of 1,024 (KiB, MiB, GiB), rates in powers of 1,000 (MB/s, GFLOP/s). Read are both: "4G" is
4e9 bytes, "4GiB" 4 x 2^30.
"""

import re

__all__ = ["amount_text", "duration_text", "parse_duration", "parse_size", "size_text", "time_text"]

_SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_MOST_DIGITS = 30


def parse_size(text: str) -> float:
    """Return the bytes of "4GiB", "512MiB", "4G" (4e9) or "4e9". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgt]i?)?b?\s*", text[:_MOST_DIGITS], re.IGNORECASE)
    if match is None or len(text) > _MOST_DIGITS:
        raise ValueError('no size; expected bytes or a number with a unit, as "4GiB" or "512MiB"')
    return float(match[1]) * _SIZES[(match[2] or "").lower()]


def parse_duration(text: str) -> float:
    """Return the seconds of "90", "90s", "5m", "1h", "1h30m" or "2d". Raises ValueError."""
    if re.fullmatch(r"\s*\d+(\.\d*)?(e[+-]?\d+)?\s*", text[:_MOST_DIGITS]) and len(text) <= _MOST_DIGITS:
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*(min|s|m|h|d)\s*", text[:_MOST_DIGITS])
    if not parts or re.sub(r"\s", "", text) != "".join(number + unit for number, unit in parts):
        raise ValueError('no duration; expected seconds, or a number with a unit, as "90", "5m" or "1h"')
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def size_text(count: float | None) -> str:
    """Return "42.7 MiB"; "-" where the count is not known."""
    if count is None:
        return "-"
    value, unit = _scaled(float(count), 1024, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB"))
    digits = 0 if unit == "bytes" else 1 if unit in ("KiB", "MiB") else 2
    return f"{value:,.{digits}f} {unit}"


def amount_text(count: float, unit: str) -> str:
    """Return "2.2 TFLOP", "47 GFLOP/s" or "9.4 MB/s" of a count of a unit, in two or three digits."""
    value, prefix = _scaled(float(count), 1000, ("", "k", "M", "G", "T", "P", "E"))
    return f"{value:.{1 if 0 < value < 9.95 else 0}f} {prefix}{unit}"


def time_text(seconds: float | None) -> str:
    """Return "0:08", "12:40", "1:02:03" or "3d 4:05:06", as a clock shows it; "?" where that is not known."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    days, (hours, rest) = whole // 86400, divmod(whole % 86400, 3600)
    clock = f"{rest // 60:02}:{rest % 60:02}" if days or hours else f"{rest // 60}:{rest % 60:02}"
    return f"{days}d {hours}:{clock}" if days else f"{hours}:{clock}" if hours else clock


def duration_text(seconds: float) -> str:
    """Return "0.4 s", "16 s", "12 min", "3 h 20 min" "2.9 days" or "3.2 years", as one says it."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    days = seconds / 86400
    return f"{days:,.1f} days" if days < 730 else f"{days / 365.25:,.1f} years"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> tuple[float, str]:
    """Return a number below the base, as far as there are units, and its unit."""
    for unit in units[:-1]:
        if abs(value) < base * 0.9995:
            return value, unit
        value /= base
    return value, units[-1]
