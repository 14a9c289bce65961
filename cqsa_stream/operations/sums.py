"""What each operation sums up: plain values, of which the planner, the files and the engine speak."""

from cqsa_stream.problem import Problem, dtype_bytes
from cqsa_stream.schedulers.operands import Field, Sum

__all__ = ["forward_sums"]


def forward_sums(problem: Problem) -> tuple[Sum, ...]:
    """Return the one sum: lse in float64, which weighs partials against each other; out as fine as the inputs."""
    lse = Field("lse", problem.group, 0, "float64", 8, "float32", 4, float("-inf"))
    partial, out = problem.partial_dtype, problem.out_dtype
    sizes = dtype_bytes(partial), out, dtype_bytes(out)
    return (Sum("rows", (lse, Field("out", problem.group, problem.value_dim, partial, *sizes, 0.0))),)
