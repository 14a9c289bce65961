"""Whole runs over arrays that are in no local folder: by HTTP, from S3, in archives and single files."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import torch
import zarr

import cqsa_stream as cqsa
from cqsa_stream.storage.dtypes import numpy_dtype
from cqsa_stream.storage.open import open_array
from cqsa_stream.storage.readers.locations import kvstore
from tests.conftest import Cli
from tests.servers import BUCKET, http_server, s3_server

QKV = ("q", "k", "v")


@pytest.fixture
def data(cli: Cli) -> None:
    words = ("--tokens", 2000, "--heads", 2, "--head-dim", 32, "--dtype", "bfloat16", "--chunk-tokens", 1000)
    assert cli("generate", "d", *words).returncode == 0


@pytest.fixture
def s3() -> Iterator[None]:
    pytest.importorskip("moto.server")  # it takes flask, too
    with s3_server():
        yield


def finished(cli: Cli, *sources: object) -> np.ndarray:
    """Run in two sessions, verify, and return the output's numbers."""
    assert cli("run", *sources, "out", "--causal", "--max-seconds", 0, "--chunks", 7).returncode == 3
    ran = cli("run", *sources, "out", "--causal")
    assert ran.returncode == 0, ran.stderr
    verified = cli("verify", "out.run", "--json", "--fetch")
    assert json.loads(verified.stdout)["ok"]
    return np.asarray(zarr.open_array("out", mode="r")[...]).astype(np.float32)


@pytest.mark.usefixtures("data")
def test_by_http(cli: Cli, tmp_path: Path) -> None:
    with http_server() as url:
        finished(cli, *(f"{url}{tmp_path}/d/{n}.zarr" for n in QKV))
        (tmp_path / "d/v.zarr/c/0/1/1/0").unlink()
        shutil.rmtree(tmp_path / "out.run")
        shutil.rmtree(tmp_path / "out")
        broken = cli("run", *(f"{url}{tmp_path}/d/{n}.zarr" for n in QKV), "out")
        assert broken.returncode == 2
        assert "value: http" in broken.stderr
        assert "missing" in broken.stderr


@pytest.mark.usefixtures("data", "s3")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_from_s3(cli: Cli, tmp_path: Path) -> None:
    bucket = ts.KvStore.open(kvstore(f"s3://{BUCKET}/run")).result()
    for file in (p for p in (tmp_path / "d").rglob("*") if p.is_file()):
        bucket.write(str(file.relative_to(tmp_path / "d")), file.read_bytes()).result()
    finished(cli, *(f"s3://{BUCKET}/run/{n}.zarr" for n in QKV))
    bucket.write("k.zarr/c/0/0/0/0", None).result()
    shutil.rmtree(tmp_path / "out.run")
    shutil.rmtree(tmp_path / "out")
    broken = cli("run", *(f"s3://{BUCKET}/run/{n}.zarr" for n in QKV), "out")
    assert broken.returncode == 2
    assert "key: s3://" in broken.stderr
    assert not (tmp_path / "out").exists(), "a missing object is found before"


@pytest.mark.usefixtures("data")
def test_from_a_plain_file_a_checkpoint_and_an_archive(cli: Cli, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    arrays = {}
    for name in QKV:
        array = open_array(tmp_path / "d" / f"{name}.zarr")
        buffer = np.empty(array.shape[1:], numpy_dtype(array.dtype))
        array.read_into(0, range(2), range(2000), buffer)
        arrays[name] = buffer
    (tmp_path / "q.bin").write_bytes(arrays["q"].tobytes())
    tensor = torch.from_numpy(arrays["k"][None].view(np.uint16)).view(torch.bfloat16)
    safetensors.save_file({"layer.0.k": tensor}, tmp_path / "model.safetensors")
    shutil.make_archive(str(tmp_path / "v"), "zip", tmp_path / "d/v.zarr")
    found = finished(cli, "q.bin#bfloat16:1,2,2000,32", "model.safetensors#layer.0.k", "v.zip")
    for leftover in ("out", "out.run"):
        shutil.rmtree(tmp_path / leftover)
    expected = finished(cli, *(f"d/{n}.zarr" for n in QKV))
    np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("data")
def test_results_are_open_to_others(cli: Cli, tmp_path: Path) -> None:
    xarray = pytest.importorskip("xarray")
    expected = finished(cli, *(f"d/{n}.zarr" for n in QKV))
    results = xarray.open_zarr(tmp_path / "out.run" / "results.zarr", consolidated=False)
    assert results["output"].dims == ("batch", "head", "token", "feature")
    assert results["lse"].dims == ("batch", "head", "token")
    np.testing.assert_array_equal(results["output"].to_numpy().astype(np.float32), expected)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/out/"}}
    np.testing.assert_array_equal(ts.open(spec).result().read().result().astype(np.float32), expected)
    assert [p for p in (tmp_path / "out" / "c").rglob("*") if p.is_file()]
    run = cqsa.open_run(tmp_path / "out.run")
    np.testing.assert_array_equal(run.lse().read().result(), results["lse"].to_numpy())
