"""The order of work on a CUDA device, by streams that only remember what was to happen before what.

Every event and every wait of ``Stage`` and ``Calls`` is real; copies, kernels and merges are names in a list. Nothing
may be overwritten while it may still be read, and nothing be read before it is there.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.leaving import outbox_for
from cqsa_stream.engine.staging import Stage
from cqsa_stream.kernels.contract import Abilities, Scores
from cqsa_stream.machine.device import Cuda
from cqsa_stream.problem import Problem
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.calls import Call, Tile
from cqsa_stream.schedulers.model.memory import Layout
from cqsa_stream.schedulers.operands import Field, Sum


class Stream:
    def __init__(self, _device: object = None) -> None:
        self.before: set[int] = set()

    def wait_stream(self, other: "Stream") -> None:
        self.before |= other.before

    def wait_event(self, event: "Event") -> None:
        event.wait(self)


class Event:
    def record(self) -> None:
        self.before = set(Device.current.before)

    def wait(self, stream: Stream) -> None:
        stream.before |= self.before


class Device:
    """Stands in for a CUDA device; what is allocated on it lies in host memory."""

    current = Stream()

    def __init__(self) -> None:
        self.count = 0
        self.written: dict[int, int] = {}
        self.read: dict[int, set[int]] = {}
        self.kernel_of: dict[int, int] = {}
        self.last_of_stream: dict[Stream, int] = {}
        self.merged: dict[int, int] = {}

    def happens(self) -> tuple[int, set[int]]:
        """Issue something on the current stream; return its number and what is done before it."""
        before = set(self.current.before)
        self.count += 1
        self.current.before.add(self.count)
        return self.count, before

    def write(self, place: Tensor) -> None:
        number, before = self.happens()
        assert self.read.get(place.data_ptr(), set()) <= before, "overwritten while a kernel may read it"
        self.written[place.data_ptr()], self.read[place.data_ptr()] = number, set()

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: int | None,
        right: int | None,
        scores: Scores,
        ahead: int = 0,
    ) -> tuple[Tensor, Tensor]:
        tile = self.last_of_stream.get(self.current)
        number, before = self.happens()
        for place in (q, k, v):
            assert self.written[place.data_ptr()] in before, "read before it was copied"
            self.read[place.data_ptr()].add(number)
        assert tile is None or self.merged[tile] in before, "the memory of a tile is taken before it is merged"
        self.last_of_stream[self.current] = number
        return torch.tensor(number), torch.tensor(0)

    def fold(self, out: Tensor, lse: Tensor, tile: Tensor, tile_lse: Tensor) -> None:
        number, before = self.happens()
        assert int(tile) in before, "merged before it was computed"
        assert set(self.merged.values()) <= before, "merged beside another tile"
        self.merged[int(tile)] = number


class Kernel:
    def __init__(self, device: Device, at_a_time: int) -> None:
        self.abilities = Abilities((torch.float32,), Tile(8, 8, 8, 8), calls_at_a_time=at_a_time)
        self.attend = self.attend_packed = device.attend


class Piece:
    """A piece in a host buffer."""

    def __init__(self, tokens: int) -> None:
        self.values = torch.zeros(1, tokens, 4)
        self.released: Event | None = None

    def release(self, until: Event | None = None) -> None:
        self.released = until


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found, empty = Device(), torch.empty
    Device.current = Stream()

    @contextmanager
    def current(stream: Stream) -> Iterator[None]:
        before, Device.current = Device.current, stream
        yield
        Device.current = before

    def upload(_stage: Stage, loaded: Piece, target: Tensor) -> None:
        found.write(target)
        event = Event()
        event.record()
        loaded.release(event)

    def allocate(*shape: Any, device: object = None, **more: Any) -> Tensor:
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: Device.current)
    monkeypatch.setattr(Stage, "_upload", upload)
    return found


@pytest.mark.parametrize("at_a_time", [1, 2])
@pytest.mark.parametrize("query_places", [2, 3, 4])
def test_nothing_is_overwritten_early_or_read_early(device: Any, query_places: int, at_a_time: int) -> None:
    shape = type("Shape", (), {"shape": (1, 1, 64, 4), "dtype": "float32"})()
    problem = Problem.of(shape, shape, shape)
    layout = Layout(
        rows_per_task=2, query_places=query_places, resident_rows=2, block_tokens=8, query_tokens=8, slot_bytes=4096,
        ring_slots=4, cache_slots=0, tile=Tile(8, 8, 8, 8), out_tokens=8,
    )  # fmt: skip
    there = Cuda(torch.device("cuda"))
    timeline: Any = SimpleNamespace(on_device=lambda *_: nullcontext())
    calls = Calls(Kernel(device, at_a_time), device.fold, there, timeline)  # type: ignore[arg-type]
    operation = type("Reader", (), {"compute_dtype": torch.float32, "row_factor": 1.0, "readers": calls.streams})()
    stage = Stage(problem, Axis(64, 8, 8), layout, there, operation, timeline)
    partial = torch.zeros(1, 8, 4), torch.zeros(1, 8)
    for _task in range(4):
        queries: dict[int, Tensor] = {}
        for column in range(5):
            key, value = stage.block(Piece(8), Piece(8))  # type: ignore[arg-type]
            for row in range(2) if column < 3 else [1]:
                if row not in queries:
                    queries[row] = stage.begin_row(row, 8)
                    stage.queries(Piece(8), queries[row])  # type: ignore[arg-type]
                calls.attend(partial, queries[row], key, value, Call(range(8), range(8)), Scores(1.0))
            stage.done()
            for row in [0] if column == 2 else [1] if column == 4 else []:
                stage.end_row(row)
    assert len(device.merged) == 4 * (3 * 2 + 2)
    assert len({id(stream) for stream in device.last_of_stream}) == at_a_time


def test_a_row_leaves_when_it_is_merged_and_then_frees_its_place(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cqsa_stream.engine.leaving.PageLock", lambda *_: SimpleNamespace(wait=lambda _place: None))
    lse, out = Field("lse", 1, 0, "float64", 8, "float32", 4, 0.0), Field("out", 1, 4, "float32", 4, "float16", 2, 0.0)
    sum_ = Sum("rows", (lse, out))
    box = outbox_for(Cuda(torch.device("cuda")), sum_, 4, 1)
    assert not box.in_place
    merged, _ = device.happens()
    freed: list[Any] = []
    fields = torch.ones(1, 4).double(), torch.full((1, 4, 4), 1.0001)
    left: Any = box.take(fields, sum_, freed.append)
    assert box.full
    assert torch.equal(left.fields[1], torch.ones(1, 4, 4, dtype=torch.float16))
    assert torch.equal(left.fields[0], torch.ones(1, 4))
    assert len(freed) == 1
    assert merged in freed[0].before
    assert merged in left.copied.before
    assert not Device.current.before - {merged}, "the stream that computes waits for nothing"
    left.release()
    assert not box.full
    assert len(freed) == 1
