"""Devices: their names, the one that has nothing to wait for, and what a driver says."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from cqsa_stream.engine.arena import PageLock, pages
from cqsa_stream.engine.leaving import outbox_for
from cqsa_stream.errors import InputError
from cqsa_stream.machine.device import DONE, Cuda, Event, Host, device_of, devices_of
from cqsa_stream.machine.driver import _handle, process_bytes
from cqsa_stream.machine.habits import HOST
from cqsa_stream.options import Options
from cqsa_stream.schedulers.operands import Field, Sum

CUDA = torch.device("cuda", 0)
SUM = Sum(
    "rows",
    (
        Field("lse", 1, 0, "float64", 8, "float32", 4, 0.0),
        Field("out", 1, 8, "float32", 4, "float16", 2, 0.0),
    ),
)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of("cpu") == Host()
    assert device_of("auto") == device_of("cuda") == device_of("cuda:0") == Cuda(CUDA)
    assert [str(device_of(name)) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]
    with pytest.raises(InputError, match="2 CUDA devices"):
        device_of("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == Host()
    with pytest.raises(InputError, match='0 CUDA devices; take device="cpu"'):
        device_of("cuda")
    for name in ("", "CPU", "cuda:", "cuda:x", "cpu:0", "mps", "cuda:0 "):
        with pytest.raises(InputError, match="expected auto, cpu, cuda"):
            device_of(name)


def test_a_host_has_nothing_to_wait_for() -> None:
    host = Host()
    stream = host.new_stream()
    with host.current(), host.on(stream):
        event = host.mark()
    stream.wait_event(event)
    stream.wait_stream(host.current_stream())
    stream.synchronize()
    event.synchronize()
    host.synchronize()
    host.forget_peak()
    assert host.lock(0, 4096) == 0
    host.unlock(0)
    assert (host.held_bytes(), host.peak_bytes(), host.free_bytes(), host.process_bytes()) == (0, 0, None, None)


def test_its_rows_leave_from_where_they_are() -> None:
    fields = torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 4, 8)
    freed: list[Event] = []
    with outbox_for(Host(), SUM, 4, 0) as box:
        assert box.in_place
        assert not box.full
        left = box.take(fields, SUM, freed.append)
        assert left.fields is fields
        left.copied.synchronize()
        assert not freed, "its place is taken until it is written"
        left.release()
        assert freed == [DONE]


def test_its_memory_counts_as_locked_at_once() -> None:
    for places in (0, 1, 300):
        with PageLock(pages(places << 12).view(places, 1 << 12), Host()) as lock:
            for place in range(places):
                lock.wait(place)


class NVMLError(Exception):
    pass


def test_what_the_driver_says_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=123)
    found: list[object] = [SimpleNamespace(pid=1, usedGpuMemory=5), mine]
    asked: list[object] = []

    def running(handle: object) -> list[object]:
        asked.append(handle)
        return found

    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=running,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a-b"))
    _handle.cache_clear()
    assert process_bytes(CUDA) == 123
    assert asked == [b"GPU-a-b"]
    mine.usedGpuMemory = None
    assert process_bytes(CUDA) is None
    found.clear()
    assert process_bytes(CUDA) is None

    def silent() -> None:
        raise NVMLError

    _handle.cache_clear()
    fake.nvmlInit = silent
    assert process_bytes(CUDA) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert process_bytes(CUDA) is None, "nvidia-ml-py is not installed"
    _handle.cache_clear()


def test_all_devices_of_a_machine_or_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of("cuda:0,2") == ["cuda:0", "cuda:2"]
    assert devices_of("cuda:1") == ["cuda:1"]
    assert devices_of("cpu") == ["cpu"]
    assert Options(device="cuda").devices == ["cuda:0", "cuda:1", "cuda:2"]
    assert Options(device="cuda:0,2", workers=3).devices == ["cuda:0", "cuda:2", "cuda:0"]
    assert (Options(device="cuda").dealt, Options(device="cuda:1").dealt) == (12, 1)
    with pytest.raises(InputError, match="named twice"):
        devices_of("cuda:1,1")


def test_each_worker_has_its_part_of_the_memory() -> None:
    each = Options(device="cpu", workers=4, host_memory="1GiB").of_a_worker()
    assert each.host_memory == (2**30 - HOST.host_reserved_bytes) // 4
    assert (each.workers, each.device) == (4, "cpu")
    assert Options(device="cpu", workers=4, host_memory="1GiB", executor="ray").of_a_worker().host_memory == 2**30
    alone = Options(device="cpu", host_memory="1GiB").of_a_worker()
    assert (alone.host_memory, alone.workers) == (2**30, 1)
    assert Options(device="cpu").of_a_worker().host_memory is None
