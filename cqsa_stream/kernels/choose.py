"""Which kernel and operator compute on a device, and what merges their tiles there. No other file imports a back end.

A choice is two names, made once for a run from the device, the stored dtype, what was measured, and the largest call of
the plan: it belongs to the plan and to the run's state. Kernels themselves choose nothing and read no files.
"""

import logging
import warnings
from collections.abc import Collection, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Protocol

import torch

from cqsa_stream.errors import InputError
from cqsa_stream.kernels.contract import Fold, Kernel, KernelChoice
from cqsa_stream.kernels.fold import fold
from cqsa_stream.kernels.online import OnlineKernel
from cqsa_stream.kernels.torch_cpu import TorchCpuKernel
from cqsa_stream.kernels.torch_cuda import TorchCudaKernel, operators

__all__ = ["KERNELS", "Measured", "choices", "chosen", "competing", "fold_for", "kernel_of", "merges_at_once"]

_log = logging.getLogger(__name__)
KERNELS = ("auto", "fa4", "torch-cuda", "cupy", "online")
_FASTEST = ("fa4", "torch-cuda")  # of which the faster is taken; other kernels are for what these cannot do


_NEEDS = {
    "cupy": 'it needs CuPy and a CUDA device; install cqsa-stream[cuda] and take device="cuda"',
    "fa4": "it needs flash-attn-4, a Hopper GPU, and arrays of 8 or 16 bits; install cqsa-stream[fa4]",
    "torch-cuda": 'it needs a CUDA device, and arrays of 8 or 16 bits; take device="cuda"',
}


class Measured(Protocol):
    """What was measured of operators."""

    def fastest(self, dtype: str, width: int, operators: Sequence[str], rows: int, columns: int) -> str | None:
        """Return the fastest operator for calls of this size; None where one of them was not measured."""


def choices(device: torch.device, stored: torch.dtype, terms: Collection[str] = ()) -> list[KernelChoice]:
    """Return all that can compute arrays of the stored dtype on a device, with these score terms; those to be preferred
    first.
    """
    found = _all(device, stored)
    return [choice for choice in found if kernel_of(choice, device, stored).abilities.terms >= set(terms)]


def competing(found: Sequence[KernelChoice]) -> list[KernelChoice]:
    """Return those of which the fastest is taken: the first kernel's operators, and all of them that may be as fast."""
    rivals = {found[0].kernel, *(_FASTEST if found[0].kernel in _FASTEST else ())}
    return [choice for choice in found if choice.kernel in rivals]


@cache
def _all(device: torch.device, stored: torch.dtype) -> list[KernelChoice]:
    own = KernelChoice("online", "products")
    if device.type == "cpu":
        return [KernelChoice("torch-cpu", "flash-for-cpu"), own]
    others = [KernelChoice("cupy", "cublas")] if _cupy() else []
    if stored == torch.float32:
        return [*others, own]
    vendors = [KernelChoice("torch-cuda", operator) for operator in operators(device, stored)]
    if torch.cuda.get_device_capability(device)[0] == 9 and _module("fa4"):  # Hopper's
        vendors.insert(0, KernelChoice("fa4", "merging"))
    return [*vendors, *others, own]


def chosen(
    device: torch.device,
    stored: torch.dtype,
    name: str | None,
    calibration: Measured | None,
    rows: int,
    columns: int,
    width: int,
    terms: Collection[str] = (),
) -> KernelChoice:
    """Return the kernel named, or the fastest exact one, with the operator that is the fastest for the largest calls:
    ``rows`` of all heads by ``columns``, head dims of ``width``. Raises InputError where that kernel cannot be, or does
    not know the score terms.
    """
    found = able = choices(device, stored, terms)
    if name not in (None, "auto"):
        found = [choice for choice in able if choice.kernel == name]
    if not found and any(choice.kernel == name for choice in _all(device, stored)):
        can = ", ".join(choice.kernel for choice in able) or "none"
        raise InputError(f"kernel {name!r} on {device} does not know {', '.join(terms)}; these do: {can}")
    if not found:
        needs = _NEEDS.get(str(name), "it is none of this device")
        raise InputError(f'kernel {name!r} cannot be on {device}: {needs}; or take kernel="auto"')
    operators = {choice.operator: choice for choice in competing(found)}
    dtype = str(kernel_of(found[0], device, stored).abilities.compute_dtype(stored)).removeprefix("torch.")
    fastest = calibration.fastest(dtype, width, tuple(operators), rows, columns) if calibration else None
    return found[0] if fastest is None else operators[fastest]


@cache
def kernel_of(choice: KernelChoice, device: torch.device, stored: torch.dtype) -> Kernel:
    """Return the kernel that was chosen, perhaps by another session. Raises InputError where it cannot be here."""
    if choice not in _all(device, stored):
        kind = str(stored).removeprefix("torch.")
        raise InputError(f"kernel {choice.kernel} ({choice.operator}) cannot compute {kind} arrays on {device} here")
    if choice.kernel == "torch-cpu":
        return TorchCpuKernel()
    if choice.kernel == "torch-cuda":
        return TorchCudaKernel(choice.operator)
    if choice.kernel == "online":
        return OnlineKernel(tall=device.type != "cpu")
    module = import_module(f"cqsa_stream.kernels.{choice.kernel}")
    kernel: Kernel = module.Fa4Kernel() if choice.kernel == "fa4" else module.CupyKernel()
    return kernel


def fold_for(device: torch.device) -> Fold:
    """Return the fastest way to merge tiles on the device: on CUDA one pass, where CuPy is there."""
    own = _cupy() if merges_at_once(device) else None
    return own.fold if own else fold


def merges_at_once(device: torch.device) -> bool:
    """Return whether tiles are merged by one kernel, which holds nothing besides them."""
    return any(choice.kernel == "cupy" for choice in _all(device, torch.float32))


def _cupy() -> ModuleType | None:
    return _module("cupy")


@cache
def _module(name: str) -> ModuleType | None:
    """Return a kernel's module where the packages that it needs are installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the packages say of each other is not the user's affair
            return import_module(f"cqsa_stream.kernels.{name}")
    except (ImportError, OSError, RuntimeError) as error:  # not there, or not for this system
        _log.info("kernel %s cannot be: %s", name, error)
        return None
