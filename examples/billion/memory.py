"""Memory, opening and planning at 2^20, 2^25 and 2^30 tokens, measured from outside.

    python examples/billion/memory.py FOLDER LOG [--seconds 20] [--tokens 2^20,2^25,2^30] [--files 50000]

The arrays of the runs are .npy files that are holes: all zeros, of any length, without room on disk. Each run works for
some seconds or to its end; the highest resident memory is what the system says of the process, of which that of the
same command that computes nothing (--max-seconds 0) is told beside it. Then arrays of 2^30 tokens in --files stored
chunks each are opened, fingerprinted and planned.
"""

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
from steps import Log, amount

DIM = 16


def holes(path: Path, rows: int) -> Path:
    """Create a .npy file of zeros that takes no room on disk."""
    np.lib.format.open_memmap(path, mode="w+", dtype="float16", shape=(1, 1, rows, DIM)).flush()
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seconds", default="20")
    parser.add_argument("--tokens", default="2^20,2^25,2^30")
    parser.add_argument("--files", type=amount, default=50_000)
    given = parser.parse_args()
    log, folder = Log(given.log), given.folder
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [amount(text) for text in given.tokens.split(",")]
    for tokens in numbers:
        array, queries = holes(folder / f"{tokens}.npy", tokens), holes(folder / f"q{tokens}.npy", 1_024)
        runs = {
            "slice": [queries, array, array, folder / "out.zarr", "--causal", "--q-start", tokens - 1_024],
            "window": [array, array, array, folder / "out.zarr", "--window", 512],
            "causal": [array, array, array, folder / "out.zarr", "--causal"],
        }
        for name, words in runs.items():
            how = ["--device", "cpu", "--host-memory", "256MiB", "--fresh", "--checkpoint-every", 5]
            idle = log.cqsa("run", *words, *how, "--max-seconds", 0, codes=(0, 3))
            ran = log.cqsa("run", *words, *how, "--max-seconds", given.seconds, codes=(0, 3))
            state, looked = log.json("status", folder / "out.zarr")
            peaks = {f"{name}_{tokens}_MiB": ran.peak_bytes >> 20, f"{name}_{tokens}_idle_MiB": idle.peak_bytes >> 20}
            log.figure(**peaks, planned_MiB=state["host_projected_bytes"] >> 20, status_s=looked.seconds)
    many_files(folder, given.files, max(numbers), log)
    shutil.rmtree(folder)


def many_files(folder: Path, files: int, tokens: int, log: Log) -> None:
    """Time opening, looking at, fingerprinting and planning arrays of so many stored chunks each."""
    import cqsa_stream as cqsa
    from cqsa_stream.inputs import check_inputs, fingerprints
    from cqsa_stream.storage.open import open_array
    from cqsa_stream.storage.output import create_array

    chunk = -(-tokens // files)
    one = folder / "one"
    create_array(one, (1, 1, chunk, DIM), "float16", (1, 1, chunk, DIM), "zstd").write(np.float16(1)).result()
    data = (one / "c/0/0/0/0").read_bytes()
    for name in ("k", "v"):
        create_array(folder / f"{name}.zarr", (1, 1, tokens, DIM), "float16", (1, 1, chunk, DIM), "zstd")
        for number in range(-(-tokens // chunk)):
            place = folder / f"{name}.zarr/c/0/0/{number}"
            place.mkdir(parents=True)
            (place / "0").write_bytes(data)
    paths = {"query": folder / f"q{tokens}.npy", "key": folder / "k.zarr", "value": folder / "v.zarr"}
    took = {}
    begin = time.perf_counter()
    arrays = {name: open_array(path) for name, path in paths.items()}
    took["opening_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    check_inputs(arrays)
    took["looking_at_every_chunk_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    fingerprints(arrays)
    took["fingerprints_s"] = time.perf_counter() - begin
    for name, asked in (("slice", {"is_causal": True, "q_start": tokens - 1_024}), ("causal", {"is_causal": True})):
        query = paths["query"] if name == "slice" else paths["key"]
        begin = time.perf_counter()
        cqsa.plan(query, paths["key"], paths["value"], out=folder / "o.zarr", device="cpu", **asked)
        took[f"planning_{name}_s"] = time.perf_counter() - begin
    log.figure(stored_chunks=2 * -(-tokens // chunk), **took, together_s=sum(took.values()))


if __name__ == "__main__":
    main()
