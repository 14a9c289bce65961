"""How the tokens may be cut into chunks: the grids that the planner weighs."""

from itertools import takewhile

from cqsa_stream.schedulers.grid import Axis
from cqsa_stream.schedulers.model.memory import Workload
from cqsa_stream.schedulers.quorums import quorum_size, singer_numbers
from cqsa_stream.schedulers.request import Machine, Request

__all__ = ["MOST_CHUNKS", "cuts", "pair_flops"]

MOST_CHUNKS = 100_000
_CHOSEN_CHUNKS = 10_303  # the most that the planner takes by itself
_LEAST_CHUNK_TOKENS = 256  # smaller chunks save little memory and cost much time


def cuts(request: Request, machine: Machine) -> list[tuple[Axis, Axis]]:
    """Return (rows, columns) as they may be cut, the fewest chunks first. Raises ValueError where that cannot be."""
    if request.grid is not None:
        return [(request.grid.rows, request.grid.columns)]
    if request.same_positions:
        whole = _whole_tokens(request)
        units = [machine.turn] if whole == 1 else [machine.turn, whole]
        found = [Axis.cut(request.keys, c, unit) for c in _same_position_chunks(request, machine) for unit in units]
        return [(axis, axis) for axis in dict.fromkeys(found)]
    numbers = _row_chunks(request, machine)
    return [(Axis.cut(request.queries, c, machine.turn), _columns(request, machine, c)) for c in numbers]


def _whole_tokens(request: Request) -> int:
    """Return how many tokens the stored chunks have that are decompressed for any part of them: a cut inside one of
    them means that it is read twice.
    """
    return max((array.chunk_tokens for array in request.arrays if array.encoding == "compressed"), default=1)


def _columns(request: Request, machine: Machine, rows: int) -> Axis:
    """Return the columns beside so many row chunks: as long as may be, in whole compressed chunks, but enough of them
    where shares are ranges of columns. Many keys make them longer, not more: what says which of them a partial holds
    does not grow with the sequence.
    """
    tokens = min(request.keys, machine.habits.column_tokens)
    if tokens > (whole := _whole_tokens(request)):
        tokens -= tokens % whole
    for most in (_CHOSEN_CHUNKS, MOST_CHUNKS):
        longer = -(-request.keys // (most * tokens)) * tokens
        if most == MOST_CHUNKS or pair_flops(request.work, -(-request.queries // rows), longer) <= machine.step_flops:
            tokens = longer
            break
    if request.work.lanes * rows < request.shares:
        tokens = max(1, min(tokens, request.keys * request.work.lanes // request.shares))
    return Axis(request.keys, tokens, -(-request.keys // tokens))


def pair_flops(work: Workload, rows: int, columns: int) -> float:
    """Return the floating-point operations of a row chunk against a column chunk, all heads of a lane."""
    return 2.0 * (work.head_dim + work.value_dim) * work.group * rows * columns


def _same_position_chunks(request: Request, machine: Machine) -> list[int]:
    """Return the Singer numbers whose pairs a run can stop between soon enough, as far as there are such."""
    chunks, keys = request.chunks, request.keys
    if chunks is not None:
        quorum_size(chunks)
        return [chunks]
    most = min(_CHOSEN_CHUNKS, max(7, keys // _LEAST_CHUNK_TOKENS))
    useful = list(takewhile(lambda c: c <= most, singer_numbers()))
    quick = [c for c in useful if pair_flops(request.work, -(-keys // c), -(-keys // c)) <= machine.step_flops]
    return quick or useful[-1:]


def _row_chunks(request: Request, machine: Machine) -> list[int]:
    chunks, queries = request.chunks, request.queries
    if chunks is not None:
        if chunks < 1:
            raise ValueError(f"{chunks} chunks; expected at least 1")
        return [chunks]
    largest = machine.habits.column_tokens
    least = min(_LEAST_CHUNK_TOKENS, largest)
    sizes = [largest >> n for n in range(largest.bit_length())]
    useful = [size for size in sizes if size >= least and -(-queries // size) <= MOST_CHUNKS]
    if not useful:
        return [MOST_CHUNKS]
    flops = {size: pair_flops(request.work, min(size, queries), largest) for size in useful}
    quick = [size for size in useful if flops[size] <= machine.step_flops]
    return sorted({-(-queries // size) for size in quick or useful[-1:]})
