"""Memory, measured from outside: a run's resident memory grows by no more than its budget, as its plan said."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, environment

MIB = 2**20
INPUTS = [f"d/{name}.zarr" for name in "qkv"]
RUN = """
import json, pathlib, sys
import psutil
import cqsa_stream
attention = cqsa_stream.attention
before = psutil.Process().memory_info().rss
directory, out, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
inputs = [f"{directory}/{name}.zarr" for name in "qkv"]
planned = cqsa_stream.plan(*inputs, out=out, **options)
attention(*inputs, out=out, **options)
high_water = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2]
peak = int(high_water.split()[0]) * 1024
report = {"grown": peak - before, "projected": planned.footprint.host_bytes, "cache": planned.layout.cache_slots}
print(json.dumps(report))
"""


def measured(tmp_path: Path, directory: str, out: str, **options: object) -> dict[str, int]:
    found = subprocess.run(
        [sys.executable, "-c", RUN, directory, out, json.dumps(options)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    report: dict[str, int] = json.loads(found.stdout)
    return report


@pytest.mark.parametrize(("dtype", "codec"), [("float32", "none"), ("bfloat16", "crc32c")])
def test_growth_stays_within_the_budget(dtype: str, codec: str, cli: Cli, tmp_path: Path) -> None:
    words = ("--heads", 2, "--head-dim", 64, "--dtype", dtype, "--codec", codec, "--chunk-tokens", 4096)
    assert cli("generate", "d", "--tokens", 30_000, *words).returncode == 0
    for schedule, budget in (("rectangular", 48), ("cqs", 64)):
        found = measured(
            tmp_path, "d", f"o-{schedule}", is_causal=True, host_memory=f"{budget}MiB", schedule=schedule, device="cpu"
        )
        assert found["projected"] <= budget * MIB
        assert found["grown"] <= found["projected"]


def test_windows_of_narrow_values_stay_within_the_budget(cli: Cli, tmp_path: Path) -> None:
    """Low tiles share keys: what the kernel pads to equal head dims is not copied for each."""
    for name, width in (("d", 128), ("narrow", 8)):
        assert cli("generate", name, "--tokens", 65_536, "--heads", 1, "--head-dim", width).returncode == 0
    (tmp_path / "d/v.zarr").rename(tmp_path / "d/wide.zarr")
    (tmp_path / "narrow/v.zarr").rename(tmp_path / "d/v.zarr")
    found = measured(tmp_path, "d", "o", window=4_096, host_memory="124MiB", device="cpu")
    assert found["grown"] <= found["projected"] <= 124 * MIB


def test_more_tokens_need_no_more_memory(cli: Cli, tmp_path: Path) -> None:
    words = ("--heads", 1, "--head-dim", 64, "--dtype", "float32")
    for name, tokens in (("short", 40_000), ("long", 160_000)):
        assert cli("generate", name, "--tokens", tokens, *words).returncode == 0
        found = measured(
            tmp_path, name, f"o-{name}", host_memory="44MiB", queries=[tokens - 2048, tokens], device="cpu"
        )
        assert found["grown"] <= found["projected"] <= 44 * MIB


@pytest.mark.parametrize("schedule", ["cqs", "rectangular"])
@pytest.mark.parametrize("extra_mib", [0, 200])
def test_the_plan_is_kept(schedule: str, extra_mib: int, cli: Cli, tmp_path: Path) -> None:
    """A small part of benchmarks/promise.py: from the smallest budget to an ample one, without and with a cache."""
    words = ("--heads", 2, "--kv-heads", 1, "--head-dim", 64, "--dtype", "float16", "--codec", "zstd")
    assert cli("generate", "d", "--tokens", 9000, "--chunk-tokens", 1024, *words).returncode == 0
    plan = ("--schedule", schedule, "--causal", "--device", "cpu", "--json")
    least = json.loads(cli("plan", *INPUTS, *plan).stdout)["host_least_bytes"]
    exactly = least + extra_mib * MIB
    found = measured(
        tmp_path, "d", "o", is_causal=True, enable_gqa=True, schedule=schedule, host_memory=exactly, device="cpu"
    )
    assert found["grown"] <= found["projected"] <= exactly
    assert found["projected"] <= found["grown"] + 32 * MIB
    status = json.loads(cli("status", "o.run", "--json").stdout)
    assert status["complete"]
    assert found["cache"] > 0 or extra_mib == 0 or schedule == "rectangular", "there is room for what comes back"
    for name in ("bytes_read", "bytes_written"):
        assert status["measured"][name] == pytest.approx(status["predicted"][name], rel=0.01)
