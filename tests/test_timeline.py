"""The timeline of a session: what its threads and its device did, and when."""

import dataclasses
import json
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import cqsa_stream as cqsa
from cqsa_stream.engine import timeline
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.events import Ended, Event, Span
from cqsa_stream.machine.device import Host


def test_spans_of_threads_and_of_the_device_are_in_one_order() -> None:
    found = Timeline(Host())
    with found.span("read", "key"):
        time.sleep(0.002)

    def write() -> None:
        with found.span("write"):
            time.sleep(0.002)

    thread = threading.Thread(target=write, name="writer")
    thread.start()
    thread.join()
    with found.on_device("kernel", "row 3"):
        time.sleep(0.002)
    with found.span("wait"):
        pass  # nobody waited
    spans = found.spans()
    assert [(s.kind, s.where, s.about) for s in spans] == [
        ("read", threading.current_thread().name, "key"), ("write", "writer", ""), ("kernel", "cpu", "row 3"),
    ]  # fmt: skip
    assert all(0 <= a.start_s < a.stop_s <= b.start_s for a, b in pairwise(spans))
    assert all(s.stop_s - s.start_s >= 0.002 for s in spans)


def test_a_span_ends_with_an_error_too() -> None:
    found = Timeline(Host())

    def read() -> None:
        with found.span("read"):
            time.sleep(0.001)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        read()
    assert [s.kind for s in found.spans()] == ["read"]


def test_a_long_session_keeps_its_first_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "_MOST_IN_PLACE", 3)
    monkeypatch.setattr(timeline, "_SHOWN_S", -1.0)
    found = Timeline(Host())
    for number in range(5):
        with found.span("read", str(number)), found.on_device("kernel", str(number)):
            pass
    for kind in ("read", "kernel"):
        assert [s.about for s in found.spans() if s.kind == kind] == ["0", "1", "2"]


def test_a_run_tells_what_it_did_and_writes_it_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    q, k, v = (torch.randn(1, 2, 3000, 32).numpy() for _ in range(3))
    seen: list[Event] = []
    cqsa.attention(q, k, v, out=tmp_path / "out", device="cpu", observers=[seen.append])
    ended = seen[-1]
    assert isinstance(ended, Ended)
    assert {"kernel", "write"} <= {span.kind for span in ended.spans}
    assert all(0 <= span.start_s <= span.stop_s <= ended.figures.session_s + 0.1 for span in ended.spans)
    stored = json.loads((tmp_path / "out.run" / "timeline.json").read_text())
    assert stored["fields"] == ["kind", "where", "start_s", "stop_s", "about"]
    spans = [Span(*fields) for fields in stored["spans"]]
    assert [(s.kind, s.where, s.about) for s in spans] == [(s.kind, s.where, s.about) for s in ended.spans]
    for mine, its in zip(spans, ended.spans, strict=True):
        assert abs(mine.start_s - its.start_s) < 1e-6


def test_json_lines_leave_the_spans_out(tmp_path: Path, cli: Any) -> None:
    assert cli("generate", "d", "--tokens", 500, "--heads", 1, "--head-dim", 16).returncode == 0
    ran = cli("run", "d/q.zarr", "d/k.zarr", "d/v.zarr", "out", "--device", "cpu", "--json")
    ends = [line for line in map(json.loads, ran.stdout.splitlines()) if line.get("type") == "ended"]
    assert ends[0]["spans"] == []


def test_a_long_session_on_a_device_counts_all_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the spans that are kept, and without waiting for what the device has not done."""
    monkeypatch.setattr(timeline, "_MOST", 10)

    class Device:
        habits = dataclasses.replace(Host().habits, own_memory=True)
        now, done = 0.0, 0.0

        def tick(self) -> float:
            self.now += 0.5
            return self.now

        def has_passed(self, tick: float) -> bool:
            return tick <= self.done

        def between_s(self, first: float, last: float) -> float:
            return last - first

        def synchronize(self) -> None:
            self.done = self.now

    device = Device()
    found = Timeline(device)  # type: ignore[arg-type]
    for _ in range(1_000):
        with found.on_device("kernel"):
            pass
        device.done = device.now - 20  # it lags behind
    assert found.busy_s("kernel") == pytest.approx(0.5 * (1_000 - 20), abs=1)
    device.synchronize()
    assert found.busy_s("kernel") == 0.5 * 1_000
    ticks = iter([device.now + 1, device.now + 3, device.now + 2, device.now + 5])  # on two streams at the same time
    monkeypatch.setattr(device, "tick", lambda: next(ticks))
    for _ in range(2):
        with found.on_device("kernel"):
            pass
    device.done = device.now + 5
    assert found.busy_s("kernel") == 0.5 * 1_000 + 4
    assert len(found._on_device) == 10
    assert not found._pending
