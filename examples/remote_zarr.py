"""Inputs behind a URL: Zarr arrays on a web server, read piece by piece; S3 and GCS are the same with s3:// and gs://.

python examples/remote_zarr.py [--tokens 8000]
"""

import argparse
import functools
import http.server
import tempfile
import threading
from pathlib import Path

import cqsa_stream as cqsa
from cqsa_stream.generate import generate


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each request."""

    def log_message(self, *_: object) -> None:
        pass


def main(tokens: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "remote", tokens=tokens, heads=2, head_dim=64, codec="zstd")
        handler = functools.partial(Quiet, directory=folder / "remote")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()

        url = f"http://127.0.0.1:{server.server_address[1]}"
        inputs = [f"{url}/{x}.zarr/" for x in "qkv"]
        out = folder / "out.zarr"  # results are local
        cqsa.attention(*inputs, is_causal=True, out=out, device="cpu", host_memory="128MiB")
        print(cqsa.open_result(out))
        print(
            cqsa.open_run(out).verify(rows=64, fetch=True)
        )  # a run directory's URLs are fetched only where you say so
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8_000)
    main(parser.parse_args().tokens)
