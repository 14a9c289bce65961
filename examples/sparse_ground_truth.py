"""The ground truth for a sparse method: how far is attention to a few keys from exact attention to all of them?

    python examples/sparse_ground_truth.py [--tokens 30000]

Here the sparse method is that of StreamingLLM: each query sees the first keys and a window. Exact attention of the same
queries comes from disk; the relative error of each row says what the method loses.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool1d

import cqsa_stream as cqsa


def main(tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        with cqsa.create_inputs(folder, (1, 2, tokens, 64), "float32") as writer:
            for start in range(0, tokens, 4_096):  # as a model would hand them over
                count = min(4_096, tokens - start)
                key = 8 * avg_pool1d(torch.randn(2, 64, count + 63), 64, 1).transpose(1, 2)[None]  # like its neighbours
                writer.append(1.5 * key, key, torch.randn_like(key))

        queries = (tokens - 1_000, tokens)
        how = {"queries": queries, "device": "cpu", "host_memory": "64MiB"}
        for out, mask in (("exact", {"is_causal": True}), ("sparse", {"mask": cqsa.masks.Strip(64, 1_024)})):
            cqsa.attention(*writer.paths, out=folder / f"{out}.zarr", **mask, **how)
        exact, sparse = (cqsa.open_result(folder / f"{out}.zarr") for out in ("exact", "sparse"))
        difference = np.linalg.norm(sparse.numpy() - exact.numpy(), axis=3)
        error = difference / np.linalg.norm(exact.numpy(), axis=3)
        seen = np.exp(sparse.lse() - exact.lse())  # which part of the softmax's sum the method has met
        print(f"exact at {cqsa.open_run(folder / 'exact.zarr').verify(rows=32).max_relative_error:.1e}")
        print(f"relative error of the sparse method: median {np.median(error):.3f}, worst {error.max():.3f}")
        print(f"weight of the keys that it sees: median {np.median(seen):.3f}, least {seen.min():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=30_000)
    main(parser.parse_args().tokens)
