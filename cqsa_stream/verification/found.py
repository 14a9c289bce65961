"""What a check of a run against float64 has found."""

from dataclasses import dataclass

__all__ = ["Verification"]


@dataclass(frozen=True)
class Verification:
    """Errors of the sampled rows, each ‖out - ref‖ / ‖ref‖ over the features.

    A row may err by two roundings to the output dtype, and by the rounding of scores and sums: 2^-23 (float32) times
    (8 + the largest |score|), times how much the terms of its sum cancel. Where 16-bit tiles come rounded from a
    GPU kernel, two more roundings to the input dtype. ``tolerance`` is the largest bound of a sampled row.
    A bound is for the worst case of one row; errors are far below it as a rule.
    ``damaged_rows`` counts the finished row chunks, sampled or not, whose output is not what was written;
    ``not_finite_rows`` the sampled rows whose reference is not finite everywhere in the output's dtype: the inputs
    hold inf or NaN, or values that overflow it. Such a feature must not be finite in the
    output, either, and counts as without an error.
    ``complete``: whether all rows of the run are finished, and not a part of them was checked.
    """

    rows: int
    max_relative_error: float
    mean_relative_error: float
    tolerance: float
    lse_max_abs_error: float
    damaged_rows: int
    not_finite_rows: int
    complete: bool
    ok: bool
