"""Sizes, rates and times: as they are written, and as they are read."""

import pytest

from cqsa_stream.schedulers.units import amount_text, duration_text, parse_duration, parse_size, size_text, time_text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (48 << 20, "48.0 MiB"), (3 << 29, "1.50 GiB"),
     (5 << 50, "5.00 PiB"), (None, "-")],
)  # fmt: skip
def test_sizes(count: int | None, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("count", "unit", "text"),
    [(0, "FLOP/s", "0 FLOP/s"), (47.2e9, "FLOP/s", "47 GFLOP/s"), (9.4e6, "B/s", "9.4 MB/s"),
     (9.96e6, "B/s", "10 MB/s"),
     (999.7e9, "FLOP", "1.0 TFLOP"), (2.199e12, "FLOP", "2.2 TFLOP")],
)  # fmt: skip
def test_amounts(count: float, unit: str, text: str) -> None:
    assert amount_text(count, unit) == text


@pytest.mark.parametrize(
    ("seconds", "clock", "said"),
    [(0.4, "0:00", "0.4 s"), (8, "0:08", "8.0 s"), (59.6, "1:00", "60 s"), (760, "12:40", "13 min"),
     (3723, "1:02:03", "62 min"), (12_000, "3:20:00", "3 h 20 min"), (300_000, "3d 11:20:00", "3.5 days"),
     (1e9, "11574d 1:46:40", "31.7 years")],
)  # fmt: skip
def test_times(seconds: float, clock: str, said: str) -> None:
    assert (time_text(seconds), duration_text(seconds)) == (clock, said)


def test_a_time_that_is_not_known() -> None:
    assert time_text(None) == "?"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("1e2", 100), ("90s", 90), ("5m", 300), ("5 min", 300), ("1h", 3600), ("1h30m", 5400),
     ("2d", 172_800), (" 1.5 h ", 5400)],
)  # fmt: skip
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5x", "-3", "1h30", "nan", "inf", "5m!", "9" * 40, "1 h 2 x"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="5m"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 2**32), ("4G", 4e9), ("4GB", 4e9), ("4e9", 4e9), ("512 mib", 2**29), ("7", 7), ("1.5k", 1500)],
)
def test_sizes_are_read(text: str, count: float) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "-4", "4 apples", "nan", "0x10", "1" * 40])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        parse_size(text)
