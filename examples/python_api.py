"""Attention over arrays on disk, from Python: plan, run, check."""

import tempfile
from pathlib import Path

import cqsa_stream as cqsa
from cqsa_stream.generate import generate


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        q, k, v = generate(Path(folder), tokens=20_000, heads=4, kv_heads=2, head_dim=64)
        out = Path(folder) / "out.zarr"
        print(cqsa.plan(q, k, v, is_causal=True, enable_gqa=True, out=out, device="cpu", host_memory="48MiB"))
        result = cqsa.attention(
            q, k, v, is_causal=True, enable_gqa=True, out=out, device="cpu", host_memory="48MiB"
        )  # a kill here, and the same call resumes
        print(result.shape, result.dtype.name, result.domain.labels)
        print(cqsa.open_run(f"{out}.run").verify(rows=64))


if __name__ == "__main__":
    main()
