"""The contract of sinks: each finished chunk comes once, whole, in any order; afterwards all of it is there."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cqsa_stream.engine.sinks import MemorySink, Sink, Stored, ZarrSink
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.storage.output import create_array, open_output

BATCH, HEADS, WIDTH = 2, (4, 2), 8  # of the sum by rows, and of the one by columns
AXES = (Axis(100, 16, 7), Axis(60, 20, 3))
DTYPES = ((torch.float32, torch.bfloat16), (torch.float32,))  # of each sum's fields
Read = Callable[[int, int], torch.Tensor]


def lane_heads(sum_: int, lane: int) -> tuple[int, range]:
    batch, place = divmod(lane, 2)
    count = HEADS[sum_] // 2
    return batch, range(place * count, place * count + count)


def shape(sum_: int, field: int) -> tuple[int, ...]:
    width = () if (sum_, field) == (0, 0) else (WIDTH,)
    return (BATCH, HEADS[sum_], AXES[sum_].tokens, *width)


def in_memory(_: Path) -> tuple[Sink, Read]:
    tensors = [
        [torch.full(shape(sum_, field), torch.nan, dtype=dtype) for field, dtype in enumerate(dtypes)]
        for sum_, dtypes in enumerate(DTYPES)
    ]
    return MemorySink(tensors, AXES, lane_heads), lambda sum_, field: tensors[sum_][field]


def on_disk(folder: Path, at_a_time: int = 1) -> tuple[ZarrSink, Read]:
    arrays = []
    for sum_, dtypes in enumerate(DTYPES):
        stored = []
        for field, dtype in enumerate(dtypes):
            path, whole, tokens = folder / f"{sum_}-{field}", shape(sum_, field), AXES[sum_].chunk_tokens // 2
            create_array(path, whole, str(dtype).removeprefix("torch."), (1, 1, tokens, *whole[3:]))
            stored.append(Stored(open_output(path), dtype, tokens))
        arrays.append(stored)

    def read(sum_: int, field: int) -> torch.Tensor:
        found = arrays[sum_][field].array.read().result()
        return torch.from_numpy(found.astype("float32")).to(DTYPES[sum_][field])

    return ZarrSink(arrays, AXES, lane_heads, at_a_time), read


def wanted() -> dict[tuple[int, int], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    places = [(sum_, field) for sum_, dtypes in enumerate(DTYPES) for field in range(len(dtypes))]
    return {place: torch.randn(shape(*place), generator=generator) for place in places}


def part(whole: torch.Tensor, sum_: int, lane: int, chunk: int) -> torch.Tensor:
    batch, heads = lane_heads(sum_, lane)
    span = AXES[sum_].span(chunk)
    return whole[batch, heads.start : heads.stop, span.start : span.stop]


def fill(sink: Sink, numbers: dict[tuple[int, int], torch.Tensor]) -> dict[tuple[int, int, int], int]:
    order = [place for n, axis in enumerate(AXES) for place in itertools.product([n], range(4), range(axis.filled))]
    random.Random(5).shuffle(order)
    return {
        (sum_, lane, chunk): sink.write(
            sum_, lane, chunk, tuple(part(numbers[sum_, f], sum_, lane, chunk) for f in range(len(DTYPES[sum_])))
        )
        for sum_, lane, chunk in order
    }


@pytest.mark.parametrize("make", [in_memory, on_disk])
def test_all_that_was_written_is_there(make: Callable[[Path], tuple[Sink, Read]], tmp_path: Path) -> None:
    sink, read = make(tmp_path)
    numbers = wanted()
    fill(sink, numbers)
    for (sum_, field), values in numbers.items():
        assert torch.equal(read(sum_, field), values.to(DTYPES[sum_][field])), "rounded once, to the field's dtype"
    on_disk_bytes = sum(values.numel() * DTYPES[sum_][field].itemsize for (sum_, field), values in numbers.items())
    assert sink.bytes_written == (on_disk_bytes if make is on_disk else 0)


def test_files_written_together_are_those_written_one_by_one(tmp_path: Path) -> None:
    (one, _), (some, read) = on_disk(tmp_path / "one"), on_disk(tmp_path / "some", 3)
    numbers = wanted()
    assert fill(one, numbers) == fill(some, numbers), "the checksums do not depend on what ends first"
    assert one.bytes_written == some.bytes_written
    for (sum_, field), values in numbers.items():
        assert torch.equal(read(sum_, field), values.to(DTYPES[sum_][field]))


def test_a_file_that_cannot_be_written_fails_the_chunk(tmp_path: Path) -> None:
    sink, _ = on_disk(tmp_path, 4)
    (tmp_path / "0-1" / "c").write_bytes(b"")
    with pytest.raises(OSError, match="0-1"):
        fill(sink, wanted())


def test_a_field_that_nobody_wants_is_left_out() -> None:
    out = torch.zeros(shape(0, 1))
    sink = MemorySink([[None, out], [None]], AXES, lane_heads)
    numbers = wanted()
    fill(sink, numbers)
    assert torch.equal(out, numbers[0, 1])


def test_what_is_stored_is_known_again_and_damage_is_seen(tmp_path: Path) -> None:
    sink, _ = on_disk(tmp_path)
    assert not sink.is_there(0, 0, 0)
    checksums = fill(sink, wanted())
    assert len(set(checksums.values())) == len(checksums)
    for place, checksum in checksums.items():
        assert sink.is_there(*place)
        assert sink.holds(*place, checksum)
        assert not sink.holds(*place, checksum ^ 1)
    [*_, file] = sorted((tmp_path / "0-1/c/1/3").rglob("*"))  # of the last lane's last head
    assert file.is_file()
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    bad = [place for place, checksum in checksums.items() if not sink.holds(*place, checksum)]
    assert bad == [place for place in checksums if place[:2] == (0, 3) and place == bad[0]], "one chunk of one lane"
    assert sink.is_there(*bad[0]), "its content is not read for that"
    file.unlink()
    assert not sink.is_there(*bad[0])
    assert not sink.holds(*bad[0], checksums[bad[0]])
