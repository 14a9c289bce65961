"""Which share of the inputs is in the page cache: a plan's seconds depend on it, its choice does not."""

import itertools
from pathlib import Path

import numpy as np
import pytest

import cqsa_stream as cqsa
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.output import create_array, write
from cqsa_stream.storage.readers import plain

SHAPE = (1, 2, 4096, 64)


def test_what_the_system_holds_in_memory_makes_the_seconds_less_and_no_other_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a look at 32 rows of each array: whether the system has them is faked."""
    for name in "qkv":
        array = create_array(tmp_path / name, SHAPE, "float32", (1, 1, 512, 64), "none")
        write(array, np.ones(SHAPE, np.float32))
    query, key, value = (str(tmp_path / name) for name in "qkv")
    plans = []
    for share in (0.0, 0.5, 1.0):
        turns = itertools.count()
        monkeypatch.setattr(plain, "all_cached", lambda *_, t=turns, s=share: next(t) % 32 < 32 * s)
        assert open_array(query).cached_share() == share
        plans.append(cqsa.plan(query, key, value, out=tmp_path / "out", device="cpu", host_memory="64MiB"))
    assert plans[0].layout == plans[1].layout == plans[2].layout
    cold, half, none = (plan.cost.seconds for plan in plans)
    assert cold > half > none
    (tmp_path / "q" / "c" / "0" / "0" / "0" / "0").unlink()
    assert open_array(query).cached_share() < 1.0, "what is missing is not there"
