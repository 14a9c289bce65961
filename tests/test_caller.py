"""What a call does to the process it is made in, and what it refuses to take: the edge of the Python surface."""

import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cqsa_stream as cqsa
from cqsa_stream.command import parse_window
from cqsa_stream.errors import NoMemoryError, RunInterrupted
from cqsa_stream.events import Ended, Event, Progressed, Started
from tests.conftest import environment
from tests.reference import dense
from tests.servers import http_server

CPU: dict[str, Any] = {"device": "cpu", "schedule": "rectangular"}


def qkv(tokens: int = 64, **options: Any) -> Any:
    return [torch.randn(1, 2, tokens, 8, **options) for _ in range(3)]


def test_every_error_is_ours() -> None:
    for name in cqsa.__all__:
        error = getattr(cqsa, name)
        if isinstance(error, type) and issubclass(error, BaseException):
            assert issubclass(error, cqsa.CqsaError), name
            assert error.exit_code in (1, 2, 3, 4, 5, 6, 130)
    full = cqsa.FullDiskError(28, "disk full", "/x")
    assert (full.errno, full.filename, isinstance(full, OSError)) == (28, "/x", True)
    assert issubclass(RunInterrupted, KeyboardInterrupt)
    assert issubclass(NoMemoryError, MemoryError)


def test_errors_import_nothing_heavy() -> None:
    check = (
        "import sys, cqsa_stream.errors; sys.exit(', '.join({'zarr', 'torch', 'tensorstore'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", check], env=environment(), check=True)


@pytest.mark.parametrize("order", ["zarr first", "zarr later"])
def test_zarr_knows_bfloat16_whichever_is_imported_first(order: str) -> None:
    imports = ["import zarr", "import cqsa_stream.storage"]
    code = "; ".join(imports if order == "zarr first" else imports[::-1])
    check = f"{code}; a = zarr.create_array({{}}, shape=(2,), dtype='bfloat16'); assert str(a.dtype) == 'bfloat16'"
    subprocess.run([sys.executable, "-c", check], env=environment(), check=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"is_causal": "no"}, "expected True or False"),
    ({"enable_gqa": 1}, "expected True or False"),
    ({"return_lse": "yes"}, "expected True or False"),
    ({"scale": "0.3"}, "finite number"),
    ({"scale": True}, "finite number"),
    ({"scale": float("inf")}, "finite number"),
    ({"queries": (0, 3, 9)}, "whole numbers"),
    ({"queries": 4}, "whole numbers"),
    ({"queries": (0.0, 3.0)}, "whole numbers"),
    ({"q_start": "0"}, "whole numbers"),
    ({"q_start": 2**62}, "positions .* expected positions below 2"),
    ({"q_start": -(2**62) - 1}, "positions .* expected positions below 2"),
    ({"window": 0}, "at least 1"),
    ({"window": -3}, "at least 1"),
    ({"window": True}, "at least 1"),
    ({"window": np.bool_(True)}, "at least 1"),
    ({"window": 2.0}, "at least 1"),
    ({"window": "7"}, "at least 1"),
    ({"queries": "3-9"}, "A:B"),
    ({"fresh": 1}, "expected True or False"),
    ({"fill_missing": "no"}, "expected True or False"),
    ({"run_dir": "r"}, "give out"),
    ({"lse": "l"}, "give out"),
    ({"out_dtype": "int8"}, "int8"),
    ({"chunks": 7.5}, "whole number"),
    ({"chunks": "7"}, "whole number"),
    ({"chunks": True}, "whole number"),
    ({"host_memory": [1]}, "host_memory"),
    ({"host_memory": float("nan")}, "host_memory"),
    ({"max_seconds": "60 apples"}, "no duration"),
    ({"checkpoint_every_s": -1}, "expected seconds"),
    ({"schedule": 3}, "expected one of"),
    ({"observers": [3]}, "functions that take an event"),
    ({"observers": print}, "functions that take an event"),
    ({"layout": "thd"}, "bthd"),
    ({"out": 3}, "expected a path"),
    ({"out": "a\0b"}, "no name of a file"),
    ({"out": "x" * 300}, "no name of a file"),
    ({"scale": 10**400}, "finite number"),
    ({"dropout_p": np.zeros(2)}, "exact"),
    ({"attn_mask": torch.ones(64, 64)}, "expected booleans.*alibi_slopes"),
    ({"dropout_p": 0.1}, "exact"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(cqsa.CqsaError, match=message) as refused:
        cqsa.attention(*qkv(), **options)
    assert type(refused.value).exit_code == 2


def test_what_a_window_is() -> None:
    assert [parse_window(window) for window in (None, 1, np.int64(2**40))] == [None, 1, 2**40]
    with pytest.raises(cqsa.InputError, match="at least 1"):
        cqsa.plan(*qkv(), window=0)


def test_plan_takes_the_arguments_of_attention() -> None:
    assert inspect.signature(cqsa.plan).parameters == inspect.signature(cqsa.attention).parameters
    with pytest.raises(TypeError, match="is_casual"):
        cqsa.plan(*qkv(), is_casual=True)  # type: ignore[call-arg]
    q, k, v = qkv()
    plan = cqsa.plan(q, k, v, None, 0.0, True, chunks=7, schedule="rectangular")
    assert (plan.schedule, plan.grid.rows.chunks, plan.pairs) == ("rectangular", 7, 2 * 28)


def test_the_words_of_the_command_line(tmp_path: Path) -> None:
    """Those of its options that a call has had no words for."""
    q, k, v = qkv()
    where: dict[str, Any] = {"out": tmp_path / "out", "lse": tmp_path / "lse", "out_dtype": "float16"}
    out = cqsa.attention(q, k, v, **where, **CPU)
    assert out.dtype.name == "float16"
    assert (tmp_path / "lse/zarr.json").exists()
    with pytest.raises(cqsa.MismatchError):
        cqsa.attention(q, k, v, is_causal=True, **where, **CPU)
    cqsa.attention(q, k, v, is_causal=True, fresh=True, **where, **CPU)
    assert cqsa.plan(q, k, v, is_causal=False, **where, **CPU).fits, "a plan is that of a new run"


def test_numpys_numbers_are_numbers() -> None:
    q, k, v = qkv()
    expected = cqsa.attention(q, k, v, chunks=7, scale=0.5, queries=(3, 9))
    numbers: dict[str, Any] = {
        "chunks": np.int64(7), "scale": np.float32(0.5), "queries": (np.int32(3), np.int64(9)),
        "is_causal": np.bool_(False), "max_seconds": np.float64(1000), "host_memory": np.int64(2**30),
    }  # fmt: skip
    found = cqsa.attention(q, k, v, **numbers)
    assert torch.equal(found, expected)


class PathLike:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_any_path_like_is_a_path(tmp_path: Path) -> None:
    q, k, v = qkv()
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        np.save(tmp_path / f"{name}.npy", tensor.numpy())
    paths: Any = [PathLike(tmp_path / f"{name}.npy") for name in "qkv"]
    found = cqsa.attention(*paths, out=PathLike(tmp_path / "out"), run_dir=PathLike(tmp_path / "run"), **CPU)
    assert np.array_equal(found.read().result(), cqsa.attention(q, k, v, **CPU).numpy())
    assert cqsa.open_run(PathLike(tmp_path / "run")).status()["complete"]


@pytest.mark.parametrize("which", range(3))
def test_gradients_are_not_dropped(which: int, tmp_path: Path) -> None:
    tensors = qkv()
    tensors[which].requires_grad_()
    ways: list[Any] = [{}, {"out": tmp_path / "out"}]
    for options in ways:
        with pytest.raises(cqsa.InputError, match=r"torch\.no_grad\(\)"):
            cqsa.attention(*tensors, **options)
    with pytest.raises(cqsa.InputError, match="forward pass only"):
        cqsa.attention(*(2 * tensor for tensor in tensors))
    with torch.no_grad():
        expected = cqsa.attention(*tensors)
    assert torch.equal(cqsa.attention(*(tensor.detach() for tensor in tensors)), expected)
    with torch.inference_mode():
        assert torch.equal(cqsa.attention(*tensors), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_gradients_are_not_dropped() -> None:
    q, k, v = qkv()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))  # type: ignore[no-untyped-call]
        with pytest.raises(cqsa.InputError, match="gradient"):
            cqsa.attention(dual, k, v)
    with pytest.raises(cqsa.CqsaError):
        torch.func.grad(lambda x: cqsa.attention(x, k, v).sum())(q)


def test_bthd_is_flash_attentions_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = (torch.randn(2, heads, 300, 16) for heads in (4, 2, 2))
    turned: Any = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    options: dict[str, Any] = {"enable_gqa": True, "is_causal": True, "return_lse": True, "chunks": 7, **CPU}
    expected, expected_lse = cqsa.attention(q, k, v, **options)
    found, lse = cqsa.attention(*turned, layout="bthd", **options)
    assert torch.equal(found, expected.transpose(1, 2))
    assert torch.equal(lse, expected_lse)
    paths: Any = [tmp_path / f"{name}.npy" for name in "qkv"]
    for path, tensor in zip(paths, turned, strict=True):
        np.save(path, tensor.numpy())
    caplog.clear()
    stored, _ = cqsa.attention(*paths, layout="bthd", out=tmp_path / "out", **options)
    assert not caplog.records
    np.testing.assert_array_equal(stored.read().result(), expected.numpy())
    run = cqsa.open_run(tmp_path / "out.run")
    assert run.verify(rows=50).ok
    status = run.status()
    assert status["measured"]["bytes_read"] == status["predicted"]["bytes_read"]
    cqsa.plan(turned[0], turned[1], turned[2], enable_gqa=True)
    assert 'layout="bthd"' in caplog.text
    caplog.clear()
    cqsa.attention(torch.randn(1, 8, 1, 16), torch.randn(1, 8, 64, 16), torch.randn(1, 8, 64, 16))
    assert not caplog.records, "one query of many heads is no sign of another layout"


def test_an_observer_cannot_hurt_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(event: Event) -> None:
        raise ValueError("a bug of the observer's")

    def late(event: Event) -> None:
        if not isinstance(event, Started):
            raise KeyError(3)

    seen: list[Event] = []
    q, k, v = qkv(512)
    out = cqsa.attention(q, k, v, chunks=7, observers=(broken, late, seen.append))
    stored = cqsa.attention(q, k, v, chunks=7, out=tmp_path / "out", observers=(broken, late, seen.append))
    np.testing.assert_allclose(stored.read().result(), out.numpy(), rtol=1e-4, atol=1e-6)
    assert len([r for r in caplog.records if "told no more" in r.message]) == 4, "once each"
    assert {type(event).__name__ for event in seen} >= {"Started", "Ended"}


def test_an_observer_does_not_replace_the_real_error(tmp_path: Path) -> None:
    def broken(event: Event) -> None:
        raise ValueError("a bug of the observer's")

    with pytest.raises(cqsa.RunStopped, match="max_seconds"):
        cqsa.attention(*qkv(512), chunks=7, out=tmp_path / "out", max_seconds=1e-3, observers=(broken,))
    assert cqsa.open_run(tmp_path / "out.run").status()["pairs_done"] > 0


def test_in_memory_nothing_is_promised_to_be_kept() -> None:
    with pytest.raises(cqsa.CqsaError, match="nothing is kept") as stopped:
        cqsa.attention(*qkv(512), chunks=57, max_seconds=0)
    assert "resume" not in str(stopped.value)


def test_results_are_opened_for_reading(tmp_path: Path) -> None:
    out, lse = cqsa.attention(*qkv(), out=tmp_path / "out", return_lse=True)
    run = cqsa.open_run(tmp_path / "out.run")
    for handle in (out, lse, run.output(), run.lse()):
        assert not handle.writable
        with pytest.raises(ValueError, match=r"[Ww]rit"):
            handle[...].write(0).result()


def interrupted_by(action: Callable[[], object]) -> Callable[[Event], None]:
    """Return an observer that acts once, when some work is done."""
    left = [action]

    def observe(event: Event) -> None:
        if isinstance(event, Progressed) and left:
            left.pop()()

    return observe


def test_the_first_ctrl_c_stops_at_a_checkpoint(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    press = interrupted_by(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        cqsa.attention(*qkv(2000), chunks=57, out=tmp_path / "out", observers=(press,), **CPU)
    assert isinstance(stopped.value, cqsa.RunInterrupted)
    assert isinstance(stopped.value, cqsa.RunStopped)
    assert signal.getsignal(signal.SIGINT) is before
    assert cqsa.open_run(tmp_path / "out.run").status()["pairs_done"] > 0


def test_a_ctrl_c_that_comes_too_late_is_not_lost(tmp_path: Path) -> None:
    def press(event: Event) -> None:
        if isinstance(event, Ended):
            os.kill(os.getpid(), signal.SIGINT)

    tensors = qkv()
    with pytest.raises(KeyboardInterrupt):
        cqsa.attention(*tensors, out=tmp_path / "out", observers=(press,), **CPU)
    assert cqsa.open_run(tmp_path / "out.run").status()["complete"]
    assert cqsa.attention(*tensors, out=tmp_path / "out", **CPU).shape == (1, 2, 64, 8)


TWICE = """
import os, signal, sys, torch, cqsa_stream as cqsa
from cqsa_stream.events import Progressed
def press(event):
    if isinstance(event, Progressed):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass
tensors = [torch.randn(1, 1, 2000, 8) for _ in range(3)]
try:
    cqsa.attention(*tensors, chunks=57, out=sys.argv[1], device="cpu", observers=(press,))
except KeyboardInterrupt as stopped:
    print(type(stopped).__name__)
print("alive", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_the_second_ctrl_c_ends_the_call_and_not_the_process(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", TWICE, str(tmp_path / "out")], env=environment(), capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[0] in ("KeyboardInterrupt", "RunInterrupted")
    assert found.stdout.splitlines()[1] == "alive True"
    assert cqsa.open_run(tmp_path / "out.run").status()["pid"] is None


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler], ids=str)
def test_handlers_are_as_they_were(handler: Any, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        cqsa.attention(*qkv(), out=tmp_path / "out", **CPU)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_c_code_set_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python says None of it, and cannot put it back."""
    calls: list[Any] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *words: calls.append(words))
    cqsa.attention(*qkv(), out=tmp_path / "out", **CPU)
    assert calls == []


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    press = interrupted_by(lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        cqsa.attention(*qkv(500), chunks=21, out=tmp_path / "out", observers=(press,), **CPU)
    finally:
        signal.signal(signal.SIGINT, before)
    assert cqsa.open_run(tmp_path / "out.run").status()["complete"]


def test_handlers_of_an_event_loop_run_after_the_call(tmp_path: Path) -> None:
    """asyncio learns of signals by a descriptor of the process's, of which there is one."""
    told: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()

        def tell() -> None:
            told.append("told")
            arrived.set()

        loop.add_signal_handler(signal.SIGUSR1, tell)
        press = interrupted_by(lambda: os.kill(os.getpid(), signal.SIGUSR1))
        cqsa.attention(*qkv(500), chunks=21, out=tmp_path / "out", observers=(press,), **CPU)
        await asyncio.wait_for(arrived.wait(), 60)

    asyncio.run(main())
    assert told == ["told"]


def test_another_thread_changes_no_handler(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGINT), []
    tensors = qkv()
    thread = threading.Thread(target=lambda: found.append(cqsa.attention(*tensors, out=tmp_path / "out", **CPU)))
    thread.start()
    thread.join()
    assert len(found) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_allocator_is_left_alone_where_no_budget_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr("cqsa_stream.machine.allocator._count", lambda _, change: used.append(change))
    cqsa.attention(*qkv())
    assert used == []
    cqsa.attention(*qkv(), host_memory="1GiB")
    assert used == [1, -1]


def test_page_locking_that_fails_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    from cqsa_stream.engine.arena import PageLock, pages
    from cqsa_stream.machine.device import Cuda

    class Runtime:
        @staticmethod
        def cudaHostRegister(*_: object) -> int:
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    lock = PageLock(pages(4096).view(1, 4096), Cuda(torch.device("cuda", 0)))
    with pytest.raises(NoMemoryError, match="smaller host_memory"):
        lock._register(0, 4096)


def test_a_moved_run_finds_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "a/d").mkdir(parents=True)
    for name, tensor in zip("qkv", qkv(512), strict=True):
        np.save(tmp_path / f"a/d/{name}.npy", tensor.numpy())
    paths: Any = [tmp_path / f"a/d/{name}.npy" for name in "qkv"]
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(*paths, chunks=7, out=tmp_path / "a/out", max_seconds=0)
    (tmp_path / "a").rename(tmp_path / "b")
    run = cqsa.open_run(tmp_path / "b/out.run").resume()
    assert run.status()["complete"]
    assert run.verify(rows=20).ok
    (tmp_path / "a/d").mkdir(parents=True)  # others, where they were
    for name, tensor in zip("qkv", qkv(512), strict=True):
        np.save(tmp_path / f"a/d/{name}.npy", tensor.numpy())
    assert run.verify(rows=20).ok
    np.save(tmp_path / "b/d/v.npy", qkv(512)[0].numpy())
    with pytest.raises(cqsa.MismatchError, match="value"):
        run.verify(rows=20)


def test_a_zarr_array_by_a_relative_path_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zarr

    monkeypatch.chdir(tmp_path)
    handles: Any = []
    for name, tensor in zip("qkv", qkv(), strict=True):
        zarr.create_array(f"{name}.zarr", data=tensor.numpy(), config={"write_empty_chunks": True})
        handles.append(zarr.open_array(f"{name}.zarr", mode="r"))
    cqsa.attention(*handles, out=tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cqsa.open_run(tmp_path / "out.run").verify(rows=20).ok


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder with q.zarr, k.zarr and v.zarr."""
    import zarr

    for name, tensor in zip("qkv", qkv(), strict=True):
        zarr.create_array(tmp_path / f"{name}.zarr", data=tensor.numpy(), config={"write_empty_chunks": True})
    with http_server() as url:
        yield f"{url}{tmp_path}"


def test_a_url_in_a_run_directory_is_fetched_only_when_asked(served: str, tmp_path: Path) -> None:
    urls: Any = [f"{served}/{name}.zarr" for name in "qkv"]
    cqsa.attention(*urls, out=tmp_path / "out")
    run = cqsa.open_run(tmp_path / "out.run")
    for act in (run.verify, run.resume):
        with pytest.raises(cqsa.InputError, match="fetch=True"):
            act()
    assert run.verify(rows=20, fetch=True).ok
    assert run.resume(fetch=True).status()["complete"]


def test_credentials_are_not_kept(served: str, tmp_path: Path) -> None:
    urls: Any = [f"{served.replace('//', '//user:secret1@', 1)}/{name}.zarr?token=secret2" for name in "qkv"]
    cqsa.attention(*urls, out=tmp_path / "out")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "out.run").rglob("*") if path.is_file())
    assert b"127.0.0.1" in kept
    assert b"secret" not in kept
    with pytest.raises(cqsa.InputError, match="not kept"):
        cqsa.open_run(tmp_path / "out.run").verify(fetch=True)


def test_verify_says_what_is_the_inputs_fault_and_what_is_left(tmp_path: Path) -> None:
    q, k, v = qkv(600)
    v[0, 0, 5, 2], v[0, 1, 9] = torch.nan, torch.inf
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        np.save(tmp_path / f"{name}.npy", tensor.numpy())
    paths: Any = [tmp_path / f"{name}.npy" for name in "qkv"]
    options: dict[str, Any] = {"is_causal": True, "chunks": 7, "schedule": "rectangular", "device": "cpu"}
    cqsa.attention(*paths, out=tmp_path / "out", **options)
    found = cqsa.open_run(tmp_path / "out.run").verify(rows=200)
    assert found.ok
    assert found.complete
    assert 0 < found.not_finite_rows <= 200
    assert found.max_relative_error < 1e-4
    steps = interrupted_by(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(cqsa.RunInterrupted):
        cqsa.attention(*paths, out=tmp_path / "part", host_memory="25MiB", observers=(steps,), **options)
    part = cqsa.open_run(tmp_path / "part.run")
    if part.status()["rows_done"]:
        assert part.verify(rows=20).ok
        assert not part.verify(rows=20).complete


def test_two_runs_do_not_share_one_lse(tmp_path: Path) -> None:
    from cqsa_stream.command import Command, Target
    from cqsa_stream.inputs import open_inputs
    from cqsa_stream.options import Options
    from cqsa_stream.problem import Problem
    from cqsa_stream.run.durable import compute
    from cqsa_stream.run.stopping import Stopper

    arrays = open_inputs(*qkv())
    problem = Problem.of(arrays["query"], arrays["key"], arrays["value"])
    refused: list[cqsa.CqsaError] = []

    def run(name: str, observers: Any = ()) -> None:
        target = Target.of(tmp_path / name, None, tmp_path / "lse")
        compute(Command(arrays, problem, Options(device="cpu"), target), observers, Stopper())

    def second(event: Event) -> None:
        if isinstance(event, Started):
            try:
                run("b")
            except cqsa.CqsaError as error:
                refused.append(error)

    run("a", (second,))
    assert len(refused) == 1
    assert isinstance(refused[0], cqsa.LockedError | cqsa.InputError)
    assert json.loads((tmp_path / "a.run/session.json").read_text())["ended"]


def test_the_time_of_a_resume_does_not_grow_with_the_finished_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first pair a session reads a bounded part of what is finished; a complete output is read whole."""
    from cqsa_stream.engine.sinks import ZarrSink
    from cqsa_stream.run import outputs

    q, k, v = qkv(2000)
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        np.save(tmp_path / f"{name}.npy", tensor.numpy())
    paths: Any = [tmp_path / f"{name}.npy" for name in "qkv"]
    read: list[int] = []
    monkeypatch.setattr(outputs, "_LOOKED_AT_BYTES", 20_000)
    whole = ZarrSink.holds

    def holds(sink: ZarrSink, sum_: int, lane: int, row: int, checksum: int) -> bool:
        read.append(row)
        return whole(sink, sum_, lane, row, checksum)

    monkeypatch.setattr(ZarrSink, "holds", holds)
    options: dict[str, Any] = {"chunks": 57, "schedule": "rectangular", "device": "cpu", "host_memory": "25MiB"}
    left = iter([None] * 90)
    with monkeypatch.context() as patch:
        patch.setattr("cqsa_stream.run.stopping.Stopper.__call__", lambda *_: next(left, "stopped"))
        with pytest.raises(cqsa.RunStopped):
            cqsa.attention(*paths, out=tmp_path / "out", **options)
    rows = cqsa.open_run(tmp_path / "out.run").status()["rows_done"]
    sink_row = 2000 // 57 * (8 * 4 + 4)
    assert rows > 20_000 // sink_row
    read.clear()
    cqsa.attention(*paths, out=tmp_path / "out", **options)
    assert 0 < len(read) <= 20_000 // sink_row + 1
    read.clear()
    cqsa.attention(*paths, out=tmp_path / "out", **options)
    assert len(read) == 2 * -(-2000 // 36), "all of the 56 row chunks of 36 tokens, for each head"
    read.clear()
    began = time.monotonic()
    cqsa.attention(*paths, out=tmp_path / "out", max_seconds=0, **options)
    assert len(read) == 1, f"the limit ends the check ({time.monotonic() - began:.1f} s)"


def test_a_chunk_of_the_output_that_is_gone_or_short_is_computed_again(tmp_path: Path) -> None:
    q, k, v = qkv(700)
    options: dict[str, Any] = {"chunks": 7, "schedule": "rectangular", "device": "cpu", "is_causal": True}
    expected = cqsa.attention(q, k, v, out=tmp_path / "whole", **options).read().result()
    steps = interrupted_by(lambda: None)
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=tmp_path / "out", max_seconds=0, host_memory="25MiB", observers=(steps,), **options)
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=tmp_path / "out", max_seconds=0, **options)
    chunks = sorted(path for path in (tmp_path / "out/c").rglob("*") if path.is_file())
    if chunks:
        chunks[0].write_bytes(chunks[0].read_bytes()[:-7])
        chunks[-1].unlink()
    np.testing.assert_array_equal(cqsa.attention(q, k, v, out=tmp_path / "out", **options).read().result(), expected)


def test_damage_far_from_the_end_is_mended_by_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check of a complete output finds is computed again, also where a session looks at a part only."""
    monkeypatch.setattr("cqsa_stream.run.outputs._LOOKED_AT_BYTES", 0)
    q, k, v = qkv(700)
    options: dict[str, Any] = {"chunks": 7, "out": tmp_path / "out", **CPU}
    expected = cqsa.attention(q, k, v, **options).read().result()
    chunks = sorted(path for path in (tmp_path / "out/c").rglob("*") if path.is_file())
    for path in (chunks[0], chunks[3]):
        data = bytearray(path.read_bytes())
        data[10] ^= 1
        path.write_bytes(data)
    np.testing.assert_array_equal(cqsa.attention(q, k, v, **options).read().result(), expected)


def test_a_session_inherits_what_numpys_numbers_said(tmp_path: Path) -> None:
    q, k, v = qkv(512)
    named: dict[str, Any] = {"host_memory": np.int64(200 << 20), "checkpoint_every_s": np.float32(7), "chunks": 57}
    with pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, out=tmp_path / "out", max_seconds=0, device="cpu", **named)
    plans: list[Any] = []
    cqsa.attention(q, k, v, out=tmp_path / "out", observers=[plans.append])
    assert plans[0].plan["host_allowed_bytes"] == 200 << 20


def test_inputs_of_which_some_moved_are_found(tmp_path: Path) -> None:
    for folder in ("job", "data"):
        (tmp_path / folder).mkdir()
    places: Any = [tmp_path / path for path in ("job/q.npy", "data/k.npy", "data/v.npy")]
    for place, tensor in zip(places, qkv(), strict=True):
        np.save(place, tensor.numpy())
    cqsa.attention(*places, out=tmp_path / "job/out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "job").rename(tmp_path / "elsewhere/job")
    assert cqsa.open_run(tmp_path / "elsewhere/job/out.run").verify(rows=20).ok


def test_two_calls_at_a_time_keep_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from cqsa_stream.machine.surroundings import undisturbed

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        first, second = undisturbed(), undisturbed()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_grad_enabled(True)  # what is nested in no order, in one thread, leaves it as the first had set it


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-42])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_verify_knows_what_small_numbers_round_to(size: float, dtype: str, tmp_path: Path) -> None:
    q, k, v = (tensor.to(getattr(torch, dtype)) for tensor in qkv(600))
    paths: Any = []
    for name, tensor in zip("qkv", (q, k, v * size), strict=True):
        wide = tensor.view(torch.uint16 if dtype == "bfloat16" else tensor.dtype).numpy()
        (tmp_path / f"{name}.bin").write_bytes(wide.tobytes())
        paths.append(f"{tmp_path / name}.bin#{dtype}:1,2,600,8")
    cqsa.attention(*paths, out=tmp_path / "out", chunks=7)
    assert cqsa.open_run(tmp_path / "out.run").verify(rows=200).ok


@pytest.mark.parametrize("above", [20.0, 80.0, 200.0, 1000.0])
def test_verify_weighs_values_that_are_not_finite(above: float, tmp_path: Path) -> None:
    """An infinite value whose key scores far below a later one's counts as long as float32 holds its weight."""
    q, k, v = (torch.zeros(1, 1, 9000, 8) for _ in range(3))
    q[..., 0], k[:, :, 8500, 0], v[..., 1] = 8**0.5, above, 1
    v[:, :, 40, 3] = torch.inf
    paths: Any = [tmp_path / f"{name}.npy" for name in "qkv"]
    for path, tensor in zip(paths, (q, k, v), strict=True):
        np.save(path, tensor.numpy())
    out = cqsa.attention(*paths, out=tmp_path / "out", chunks=7, queries=(0, 50))
    assert cqsa.open_run(tmp_path / "out.run").verify(rows=50).ok
    assert np.isinf(out.read().result()[..., 3]).all() == (above < 200)


def test_zarr_learns_bfloat16_also_after_somebody_asked_for_it() -> None:
    code = "import cqsa_stream.storage, importlib.util; assert importlib.util.find_spec('zarr'); import zarr"
    check = f"{code}; a = zarr.create_array({{}}, shape=(2,), dtype='bfloat16'); assert str(a.dtype) == 'bfloat16'"
    subprocess.run([sys.executable, "-c", check], env=environment(), check=True)


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://bucket/x?sig=secret", "https://u:sec ret@host/x"])
def test_secrets_are_not_in_messages(url: str, tmp_path: Path) -> None:
    ways: list[Any] = [{"out": url}, {"out": tmp_path / "o", "run_dir": url}]
    for places in ways:
        with pytest.raises(cqsa.InputError) as refused:
            cqsa.attention(*qkv(), **places)
        assert "sec" not in str(refused.value)
    with pytest.raises(cqsa.CqsaError) as refused_input:
        cqsa.attention(url, url, url)
    assert "sec" not in str(refused_input.value)


def test_values_that_overflow_a_sum_are_finite() -> None:
    q, k, v = qkv(300)
    v = torch.where(v > 0, 3.4e38, -3.4e38)
    expected, _ = dense(q, k, v)
    for chunks in (7, 21):
        out = cqsa.attention(q, k, v, chunks=chunks, **CPU)
        assert float((out.double() / 1e38 - expected / 1e38).abs().max()) < 1e-5
