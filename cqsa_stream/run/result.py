"""The result of a run, as torch, numpy and xarray have it."""

import operator
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import torch

from cqsa_stream.errors import ArrayError, InputError
from cqsa_stream.machine.places import local_path
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.opened import Run
from cqsa_stream.run.standing import run_place
from cqsa_stream.storage.dtypes import ML_DTYPES
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import DIMENSIONS, holds_array, open_output, read

__all__ = ["Result", "open_result"]


def open_result(path: str | os.PathLike[str]) -> "Result":
    """Open the result of a run by its output, or by its run directory.

    Raises InputError where there is none, or where the run is not complete.
    """
    named = local_path(path)
    place = run_place(named)
    if not RunDirectory(place).begun:
        _refuse_what_is_no_output(named)
        return Result(named, None)
    run = Run(place)
    status = run.status(durable=False)
    if not status["complete"]:
        done = f"{status['rows_done']} of {status['rows_total']} row chunks are finished"
        raise InputError(f"{named}: {done}; resume the run first, with the command that began it")
    return Result(run.directory.output_path(run.manifest), run)


def _refuse_what_is_no_output(path: Path) -> None:
    """Raise InputError where no array is, or one of other axes, or one that lacks stored chunks."""
    if not holds_array(path):
        raise InputError(f"{path}: no result and no run directory; name the output of a run, as out.zarr")
    array = open_array(path)
    if len(array.shape) != len(DIMENSIONS):
        raise InputError(f"{path}: {len(array.shape)} axes; expected the output of a run, {list(DIMENSIONS)}")
    try:
        array.check()
    except ArrayError as error:
        raise InputError(f"{path}: not complete ({error}); resume the run first, or name its directory") from error


class Result:
    """The output ``[batch, head, token, feature]`` of a complete run; nothing is read before it is asked for.

    ``queries=(a, b)`` reads the rows a to b-1 alone.
    """

    def __init__(self, path: Path, run: Run | None) -> None:
        self.path, self.run = path, run
        self._array = open_output(path)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def dtype(self) -> str:
        return str(self._array.dtype.name)

    def numpy(self, queries: tuple[int, int] | None = None) -> np.ndarray:
        """Return a numpy array; bfloat16 as the dtype of that name in ml_dtypes."""
        return read(_rows(self._array, queries))

    def torch(self, queries: tuple[int, int] | None = None) -> torch.Tensor:
        """Return a tensor on the CPU."""
        found = self.numpy(queries)
        if self.dtype not in ML_DTYPES:
            return torch.from_numpy(found)
        return torch.from_numpy(found.view(np.uint16)).view(getattr(torch, self.dtype))

    def lse(self, queries: tuple[int, int] | None = None) -> np.ndarray:
        """Return the log-sum-exp ``[batch, head, token]``, float32. Raises InputError without a run directory."""
        if self.run is None:
            raise InputError(
                f"{self.path}: its run directory is not beside it, and the log-sum-exp is there; name the run directory"
            )
        return read(_rows(self.run.lse(), queries))

    def xarray(self, queries: tuple[int, int] | None = None) -> Any:
        """Return an ``xarray.DataArray`` with named axes; ``lse`` is a coordinate of it where the run is there.

        Raises InputError without xarray.
        """
        try:
            import xarray
        except ImportError as error:
            raise InputError(f"xarray: {error}; install it (pip install xarray)") from error

        coordinates = {} if self.run is None else {"lse": (DIMENSIONS[:3], self.lse(queries))}
        return xarray.DataArray(self.numpy(queries), dims=DIMENSIONS, coords=coordinates, name="output")

    def __repr__(self) -> str:
        return f"<Result {self.path}: {list(self.shape)} {self.dtype}>"


def _rows(array: ts.TensorStore, queries: tuple[int, int] | None) -> ts.TensorStore:
    """Return some of the rows. Raises InputError where there are none such."""
    if queries is None:
        return array
    try:
        first, stop = map(operator.index, queries)
    except (TypeError, ValueError) as error:
        raise InputError(f"queries {queries!r}; expected two whole numbers, as (0, 1000)") from error
    if not 0 <= first < stop <= array.shape[2]:
        raise InputError(f"queries {first}:{stop}; expected 0 <= A < B <= {array.shape[2]} (the rows of the result)")
    return array[:, :, first:stop][ts.d[:].translate_to[0]]
