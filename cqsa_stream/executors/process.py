"""The process of a worker that another process has started, and that ends when that one has."""

import os
import signal
import sys
import threading
from pathlib import Path

from cqsa_stream.errors import CqsaError, RunStopped
from cqsa_stream.run.stopping import Stopper

__all__ = ["main"]


def main() -> None:
    """Work as the arguments say: run directory, number, count, device. Ends by the exit code.

    The starter holds our stdin: when it has ended, we stop at the next safe point, as by a signal.
    """
    code = 0
    with Stopper((signal.SIGTERM,), owns_process=True) as stop:
        threading.Thread(target=_watch, args=(stop,), name="cqsa-starter", daemon=True).start()
        from cqsa_stream.run.working import work

        path, number, count, device = sys.argv[1:]
        try:
            work(Path(path), (int(number), int(count)), (), stop, device=device, fetch=True)  # our starter named them
        except CqsaError as error:
            code = error.exit_code
            if not isinstance(error, RunStopped):
                print(f"cqsa: worker {number}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        except (OSError, MemoryError) as error:
            code = 1
            print(f"cqsa: worker {number}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)  # threads of libraries may hold an interpreter that ends


def _watch(stop: Stopper) -> None:
    os.read(0, 1)
    stop.ask("the process that started this worker has ended")
