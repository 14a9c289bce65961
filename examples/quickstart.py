"""Attention over numpy arrays of your own: from .npy files on disk, within a small budget, read back in torch.

    python examples/quickstart.py [--tokens 20000]

Axes are [batch, head, token, feature]. For arrays of flash-attention, [batch, token, head, feature], add layout="bthd".
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import cqsa_stream as cqsa


def main(tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generator = np.random.default_rng(0)
        q, k, v = (folder / f"{x}.npy" for x in "qkv")
        for path in (q, k, v):
            np.save(path, generator.standard_normal((1, 4, tokens, 64), np.float32))

        out = folder / "out.zarr"
        print(cqsa.plan(q, k, v, is_causal=True, out=out, device="cpu", host_memory="64MiB"))
        cqsa.attention(q, k, v, is_causal=True, out=out, device="cpu", host_memory="64MiB", progress=True)

        result = cqsa.open_result(out)
        print(result)
        print(cqsa.open_run(out).verify(rows=64))

        row = tokens - 1  # by torch's own attention: the last query sees every key
        last = torch.from_numpy(np.load(q)[:, :, row:])
        keys, values = (torch.from_numpy(np.load(path)) for path in (k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(last, keys, values)
        torch.testing.assert_close(result.torch(queries=(row, row + 1)), expected)
        print("the last row is that of torch's own attention")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=20_000)
    main(parser.parse_args().tokens)
