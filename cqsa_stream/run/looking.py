"""The fingerprints of a new run's inputs, taken while a device of its own computes already: it need not wait for them.

Until they are there the manifest names none, and nothing counts as done: a run that ends before has no result of any
input, and is resumed with whatever inputs are named then.
"""

import threading
from dataclasses import replace
from pathlib import Path

from cqsa_stream.inputs import fingerprints, naming
from cqsa_stream.run.directory import RunDirectory
from cqsa_stream.run.manifest import Manifest
from cqsa_stream.storage.contract import TokenArray
from cqsa_stream.storage.fingerprint import SMALL_BYTES
from cqsa_stream.storage.open import open_array

__all__ = ["Looking", "known", "opened_again"]


class Looking:
    """Takes them when something is to be stored first, in the thread that stores it; a context manager, whose end takes
    them where nothing was.
    """

    def __init__(self, arrays: dict[str, TokenArray], directory: RunDirectory, manifest: Manifest) -> None:
        self._arrays, self._directory, self._manifest = arrays, directory, manifest
        self._written = False
        self._writing = threading.Lock()  # several threads store

    def __enter__(self) -> "Looking":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.wait()

    def wait(self) -> None:
        """See to it that they are on disk. Raises what reading the inputs raises."""
        with self._writing:
            if not self._written:
                self._directory.write_manifest(known(self._manifest, fingerprints(self._arrays)))
                self._written = True


def known(manifest: Manifest, prints: dict[str, str]) -> Manifest:
    """Return the manifest with the inputs' fingerprints."""
    inputs = {name: {**about, "fingerprint": prints[name]} for name, about in manifest.inputs.items()}
    return replace(manifest, inputs=inputs)


def opened_again(arrays: dict[str, TokenArray], layout: str, *, fill_missing: bool) -> dict[str, TokenArray] | None:
    """Return the arrays opened anew, so that what reads them is not counted as the run's; None where they are not local
    ones of which any range can be read.
    """
    if not all(
        Path(it.source).is_absolute() and it.encoding == "raw" and it.staging_bytes <= SMALL_BYTES
        for it in arrays.values()
    ):
        return None
    found = {}
    for name, array in arrays.items():
        with naming(name):
            found[name] = open_array(array.source, layout=layout, fill_missing=fill_missing)
    same = all((it.shape, it.dtype) == (found[name].shape, found[name].dtype) for name, it in arrays.items())
    return found if same else None
