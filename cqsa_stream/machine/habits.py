"""The habits of the two kinds of devices: every constant that depends on where kernels run."""

from dataclasses import replace

from cqsa_stream.schedulers.model.habits import Habits
from cqsa_stream.schedulers.model.rates import Speeds

__all__ = ["CUDA", "HOST"]

_SPEEDS = Speeds(
    read_bytes_per_s=1e9, write_bytes_per_s=5e8, stage_bytes_per_s=4e9, touch_bytes_per_s=2e9, file_s=2e-3,
    file_lost_s=1e-3, block_s=1e-4, read_cpu_s=1e-10, check_cpu_s=2.5e-10, expand_cpu_s=4e-9,
)  # fmt: skip
_BESIDE = replace(
    _SPEEDS, read_bytes_per_s=2e9, write_bytes_per_s=1e9, stage_bytes_per_s=2e10, file_lost_s=1e-9, block_s=1e-3,
)  # fmt: skip

HOST = Habits(
    own_memory=False,
    writers=1,  # they take time from the kernels
    reads_at_a_time=2,
    most_in_flight=6,  # what reads hold besides should be small beside the budget
    long_ring=0,
    block_tokens=16_384,
    column_tokens=16_384,
    block_buffers=1,
    whole_tokens=1,
    step_flops=(2e11, 2e11),
    flops_per_s=(5e10, 5e10),
    triangles=(1.0, 0.7),
    calls_in_a_row=1,
    trial=(2_048, 1_024),
    host_reserved_bytes=21 << 20,
    nominal=_SPEEDS,
)

CUDA = Habits(
    own_memory=True,
    writers=4,
    reads_at_a_time=4,
    most_in_flight=12,
    long_ring=64,  # it starves while a task has few rows left, unless much was read before
    block_tokens=202_752,
    column_tokens=202_752,
    block_buffers=2,
    whole_tokens=128,  # its kernels take so many rows or keys at a time
    step_flops=(1e15, 1e13),
    flops_per_s=(4e14, 3e13),
    triangles=(0.5, 0.5),
    calls_in_a_row=4,
    trial=(50_688, 65_536),  # whole turns of 132 processors
    host_reserved_bytes=1 << 30,
    nominal=_BESIDE,
)
