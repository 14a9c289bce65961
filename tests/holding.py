"""Commands that are held at a safe point until they are told to go on: what a test does meanwhile is never too late."""

import subprocess
import sys
import time
from pathlib import Path

__all__ = ["HELD", "HOLDING", "STUCK", "TOLD", "go_on", "wait_for"]

HELD, TOLD, _GO = "held", "told", "go"  # files in the folder of the command
# Waits at the safe point of which HOLD_AT tells the number, the first being 0, until a signal comes, or the word to go.
HOLDING = [sys.executable, "-c", f"""
import os, time
from pathlib import Path
from cqsa_stream.cli import main
from cqsa_stream.run.stopping import Stopper

asked, left = Stopper.__call__, iter(range(int(os.environ["HOLD_AT"]), -1, -1))

def hold(self, early_s=0.0):
    if next(left, None) == 0:
        Path("{HELD}").touch()
        deadline = time.monotonic() + 600
        while self.received is None and not Path("{_GO}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    return asked(self, early_s)

Stopper.__call__ = hold
main()
"""]  # fmt: skip
# Comes to no end at its first safe point, in a call that no signal interrupts, as if a kernel took for ever.
STUCK = [sys.executable, "-c", f"""
import ctypes, os, threading, time
from pathlib import Path
from cqsa_stream.cli import main
from cqsa_stream.run.stopping import Stopper

def tell(stop):
    deadline = time.monotonic() + 600
    while stop.received is None and time.monotonic() < deadline:
        time.sleep(0.01)
    Path("{TOLD}").touch()
    time.sleep(600)
    os._exit(99)

def stick(self, early_s=0.0):
    threading.Thread(target=tell, args=(self,), daemon=True).start()
    Path("{HELD}").touch()
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

Stopper.__call__ = stick
main()
"""]  # fmt: skip


def wait_for(path: Path, process: "subprocess.Popen[str]", timeout_s: float = 300) -> bool:
    """Wait until a file is there; return False where the process ends before."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"no {path} in {timeout_s} s"
        time.sleep(0.002)
    return True


def go_on(folder: Path) -> None:
    """Let the command that is held in a folder go on."""
    (folder / _GO).touch()
