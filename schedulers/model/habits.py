"""What plans and engines know of a kind of device. Its values are those of ``machine.habits``."""

from dataclasses import dataclass

from cqsa_stream.schedulers.model.rates import Speeds

__all__ = ["Habits"]


@dataclass(frozen=True)
class Habits:
    """How a kind of device is worked with.

    ``own_memory``: it has a pool of its own, to which blocks are copied, and which partials and complete rows leave by
    copies; else the host's memory is the device's, and kernels share the processor with all other work.
    ``writers``: threads that write complete rows; ``reads_at_a_time``: pieces that are read at a time, so that the disk
    has work when one of them ends; ``most_in_flight``: parts of such reads; ``long_ring``: blocks that are read ahead
    where memory allows it, 0 where a few do.
    ``block_tokens``, ``column_tokens``: of the largest block and column chunk; ``block_buffers``: for blocks that are
    copied or upcast, which take turns; ``whole_tokens``: parts of chunks are whole numbers of so many.
    ``step_flops``: the most between two moments at which a run can stop; ``flops_per_s``: nominal, for each compute
    thread where there are any. Each of tiles of 16 bits, and of wider ones. ``triangles``: nominal, the seconds of a
    causal tile, alone and of several in one call, over those of a full one.
    ``calls_in_a_row``: issued before their time is taken; ``trial``: rows and columns of the call by which an
    unmeasured kernel is timed.
    ``host_reserved_bytes``: libraries' own, code pages, stacks, handles; measured. ``nominal``: the speeds of a machine
    that was not measured.
    """

    own_memory: bool
    writers: int
    reads_at_a_time: int
    most_in_flight: int
    long_ring: int
    block_tokens: int
    column_tokens: int
    block_buffers: int
    whole_tokens: int
    step_flops: tuple[float, float]
    flops_per_s: tuple[float, float]
    triangles: tuple[float, float]
    calls_in_a_row: int
    trial: tuple[int, int]
    host_reserved_bytes: int
    nominal: Speeds
