"""Kernels that merge their tiles themselves: the contract of ``merge``; engine, planner and choice around it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import cqsa_stream as cqsa
from cqsa_stream import planning
from cqsa_stream.engine.calls import Calls
from cqsa_stream.engine.timeline import Timeline
from cqsa_stream.errors import InputError
from cqsa_stream.kernels import choose
from cqsa_stream.kernels.contract import Abilities, KernelChoice, Partial, Scores
from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.online import OnlineKernel
from cqsa_stream.machine import budgets
from cqsa_stream.machine.device import Host, device_of
from cqsa_stream.run import session
from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.masks.arrays import LEAST, MOST, Bands64, sorted_bands
from cqsa_stream.schedulers.masks.calls import Call, Packed, Tile
from tests.masked import MASKS, TERMS, check, reference

TILE = Tile(64, 96, 64, 64, bands=True, skips=True, small=16, pack=64)


class Merging(OnlineKernel):
    """A kernel that merges, on the CPU: tiles by our own kernel, merged where they belong."""

    def __init__(self) -> None:
        super().__init__()
        self.abilities = replace(self.abilities, merges=True, whole_dims=8, tile=TILE)
        self.merged = 0

    def merge(
        self, partial: Partial, q: Tensor, k: Tensor, v: Tensor, call: Call | Packed, scores: Scores, ahead: int = 0
    ) -> None:
        self.merged += 1
        out, lse = partial
        if isinstance(call, Packed):
            fold(out, lse, *self.attend_packed(q, k, v, call.here, scores, ahead))
            return
        for tile in range(call.tiles):
            rows = slice(tile * call.height, (tile + 1) * call.height)
            keys = slice(tile * call.height, tile * call.height + len(call.columns))
            found = self.attend(q[:, rows], k[:, keys], v[:, keys], call.left, call.right, scores, ahead)
            fold(out[:, rows], lse[:, rows], *found)


def fa4() -> object:
    """Flash attention 4, where it is installed and runs."""
    try:
        place = device_of("cuda").torch
        return choose.kernel_of(KernelChoice("fa4", "merging"), place, torch.bfloat16)
    except InputError:
        return None


PARAMETERS = ("kernel", "device", "dtype", "tolerance")
KERNELS = [
    pytest.param(Merging(), "cpu", torch.float32, 2e-6, id="online"),
    pytest.param(fa4(), "cuda", torch.bfloat16, 3e-3, id="fa4", marks=pytest.mark.gpu),
]


def causal_documents() -> Bands64:
    """Three documents whose last rows see their last keys, with rows in between that see nothing."""
    r0, r1, c0 = np.array([0, 150, 400]), np.array([100, 400, 403]), np.array([0, 200, 500])
    return sorted_bands(np.stack([r0, r1, c0, c0 + r1 - r0, np.full(3, LEAST), c0 - r0]))


CALLS: dict[str, Call | Packed] = {
    "full": Call(range(300), range(500)),
    "causal": Call(range(300), range(300), None, 0),
    "reversed": Call(range(300), range(300), 0, None),
    "window": Call(range(300), range(420), 7, 127),
    "open to the left": Call(range(200), range(333), None, 140),
    "open to the right": Call(range(200), range(333), 5, None),
    "stacked triangles": Call(range(300), range(100), None, 0, 3),
    "stacked windows": Call(range(300), range(160), 0, 60, 3),
    "packed": Packed(causal_documents()),
}


@pytest.fixture(autouse=True)
def _kernel_is_there(request: pytest.FixtureRequest) -> None:
    found = getattr(request.node, "callspec", None)
    if found is not None and found.params.get("kernel", 0) is None:
        pytest.skip("no Hopper GPU, or no flash-attn-4")


def seen_by(call: Call | Packed, rows: int, keys: int) -> Tensor:
    row, key = torch.arange(rows)[:, None], torch.arange(keys)
    found = torch.zeros(rows, keys, dtype=torch.bool)
    if isinstance(call, Packed):
        for r0, r1, c0, c1, _, hi in call.here.T.tolist():
            found |= (row >= r0) & (row < r1) & (key >= c0) & (key < c1) & (key - row <= hi)
        return found
    for tile in range(call.tiles):
        first = tile * call.height
        mine = (row >= first) & (row < first + call.height) & (key >= first) & (key < first + len(call.columns))
        left = MOST if call.left is None else call.left
        right = MOST if call.right is None else call.right
        found |= mine & (key - row >= -left) & (key - row <= right)
    return found


@pytest.mark.parametrize(PARAMETERS, KERNELS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (40, 24)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_merged_in_place(
    kernel: Merging, device: str, dtype: torch.dtype, tolerance: float, name: str, dims: tuple[int, int],
    heads: tuple[int, int],
) -> None:  # fmt: skip
    """A call merges into what its rows hold: nothing, and something; rows that it shows no key are left alone."""
    call, generator = CALLS[name], torch.Generator().manual_seed(len(name))
    rows, keys = len(call.rows), len(call.reach)
    q, k, v = (
        torch.randn(heads[i > 0], n, dims[i > 1], generator=generator).to(device, dtype)
        for i, n in enumerate((rows, keys, keys))
    )
    if isinstance(call, Call) and call.tiles > 1 and heads[1] > 1:
        pytest.skip("tiles share the keys of one head")
    its_q, its_k, its_v = (x[None].cpu() for x in (q, k, v))
    expected, expected_lse = reference(its_q, its_k, its_v, seen_by(call, rows, keys))
    scores, sees = Scores(dims[0] ** -0.5), ~expected_lse.isneginf()
    held = torch.randn(heads[0], rows, dims[1], generator=generator).double()
    for before in (-torch.inf, 1.5, 60.0, -60.0):
        out, lse = held.float().to(device), torch.full((heads[0], rows), before, dtype=torch.float64, device=device)
        if before == -torch.inf:
            out.fill_(torch.nan)  # what stands where nothing was summed up is not read
        kernel.merge((out, lse), q, k, v, call, scores)
        total = torch.logaddexp(expected_lse[0], torch.tensor(before).double())
        share = torch.exp(expected_lse[0] - total)[..., None]
        wanted = expected[0] * share + (held * (1 - share) if before != -torch.inf else 0.0)
        found, at = out.cpu().double(), sees[0]
        assert float((found[at] - wanted[at]).norm()) <= tolerance * float(wanted[at].norm())
        torch.testing.assert_close(lse.cpu()[at], total[at], rtol=1e-5, atol=1e-5)
        blind = ~at
        assert bool((lse.cpu()[blind] == before).all())
        if before != -torch.inf:
            assert torch.equal(found[blind], held.float().double()[blind])


@pytest.mark.parametrize(PARAMETERS, KERNELS)
def test_the_same_bits_again(kernel: Merging, device: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (torch.randn(2, 700, 64).to(device, dtype) for _ in range(3))
    found = []
    for _ in range(2):
        out = torch.zeros(2, 700, 64, device=device)
        lse = torch.full((2, 700), -torch.inf, dtype=torch.float64, device=device)
        for keys in (range(300), range(300, 301), range(301, 700)):
            part = slice(keys.start, keys.stop)
            kernel.merge((out, lse), q, k[:, part], v[:, part], Call(range(700), keys), Scores(0.125))
        found.append((out, lse))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> Merging:
    """Let every run on the CPU take a kernel that merges."""
    kernel = Merging()
    for module in (planning, budgets, session):
        monkeypatch.setattr(module, "kernel_of", lambda *_: kernel)
    return kernel


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("mask", ["full", "causal documents", "window", "strip", "blocks of documents"])
@pytest.mark.parametrize("term", ["plain", "soft cap", "sinks"])
def test_runs_by_a_kernel_that_merges(merging: Merging, mask: str, term: str, schedule: str) -> None:
    rule, seen = MASKS[mask]
    q, k, v = (torch.randn(1, heads, len(seen), 16) for heads in (4, 2, 2))
    found = cqsa.attention(
        q, k, v, enable_gqa=True, mask=rule, device="cpu", schedule=schedule, chunks=7, return_lse=True, **TERMS[term]
    )
    assert merging.merged > 0
    check(found, reference(q, k, v, seen, **TERMS[term]), torch.float32)


def test_dims_that_it_does_not_take_are_padded_and_their_tiles_merged(merging: Merging) -> None:
    q, k, v = (torch.randn(1, 2, 100, 12) for _ in range(3))
    found = cqsa.attention(q, k, v, is_causal=True, device="cpu", return_lse=True)
    assert merging.merged == 0
    check(found, reference(q, k, v, torch.ones(100, 100, dtype=torch.bool).tril()), torch.float32)


def test_no_tile_is_counted_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 1, 4096, 64) for _ in range(3))
    tiles = []
    for merges in (True, False):
        kernel = Merging()
        kernel.abilities = replace(kernel.abilities, merges=merges)
        for module in (planning, budgets):
            monkeypatch.setattr(module, "kernel_of", lambda *_, kernel=kernel: kernel)
        tiles.append(cqsa.plan(q, k, v, device="cpu").footprint.pageable["tile"])
    assert tiles[0] == 0 < tiles[1]


def test_a_call_is_one_launch_on_the_current_stream() -> None:
    kernel, timeline = Merging(), Timeline(Host())
    calls = Calls(kernel, fold, Host(), timeline)
    out, lse = torch.zeros(1, 8, 8), torch.full((1, 8), -torch.inf, dtype=torch.float64)
    q = torch.randn(1, 8, 8)
    calls.attend((out, lse), q, q, q, Call(range(8), range(8)), Scores(1.0))
    assert kernel.merged == 1
    assert [span.kind for span in timeline.spans()] == ["kernel"]
    torch.testing.assert_close(out, torch.softmax(q @ q.transpose(1, 2), 2) @ q)


def test_what_a_kernel_merges_and_how_many_rows_its_processors_take() -> None:
    can = Abilities((torch.float16,), TILE, merges=True, whole_dims=8, block_rows=((96, 192), (256, 128)))
    assert can.merging(64, 64)
    assert not can.merging(64, 128)
    assert not can.merging(12, 12)
    assert not replace(can, merges=False).merging(64, 64)
    assert [can.turn(dim, 132) for dim in (64, 96, 97, 256, 512)] == [25_344, 25_344, 16_896, 16_896, 1]
    assert can.turn(64, 0) == 1


def test_a_stack_may_have_more_tiles_than_a_launch_takes() -> None:
    call = Call(range(10, 80), range(3, 8), 2, 1, 7)
    parts = list(call.parts(3))
    assert [part.tiles for part in parts] == [3, 3, 1]
    assert [part.rows for part in parts] == [range(10, 40), range(40, 70), range(70, 80)]
    assert [part.columns for part in parts] == [range(3, 8), range(33, 38), range(63, 68)]
    assert [part.reach for part in parts] == [range(3, 28), range(33, 58), range(63, 68)]
    assert all((part.left, part.right, part.height) == (2, 1, 10) for part in parts)
    assert list(call.parts(7)) == [call]


@pytest.mark.parametrize(("chunks", "expected"), [(7, 6 * 25_344), (21, 2 * 25_344), (13, 81_920)])
def test_chunks_are_whole_turns_where_that_costs_little(chunks: int, expected: int) -> None:
    axis = Axis.cut(1 << 20, chunks, 25_344)
    assert axis.chunk_tokens == expected
    assert axis.chunk_tokens * chunks >= axis.tokens
    assert 8 * axis.chunk_tokens <= 9 * -(-axis.tokens // chunks)


def test_the_fastest_of_all_that_may_be_fast_is_taken() -> None:
    a, b, c, d = (KernelChoice(name, "x") for name in ("fa4", "torch-cuda", "cupy", "online"))
    assert choose.competing([a, b, c, d]) == [a, b]
    assert choose.competing([b, c]) == [b]
    assert choose.competing([c, d]) == [c]
