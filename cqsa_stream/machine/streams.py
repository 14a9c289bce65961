"""CUDA streams and events, as far as they are needed: whoever issues work says what it waits for; nobody here waits."""

import torch

__all__ = ["Foreign", "mark", "new_stream", "waited_for"]


class Foreign:
    """A torch stream as other libraries take it (CUDA stream protocol), which older ones of torch's are not."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream whose work begins after all that was issued on the current one."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def mark() -> torch.cuda.Event:
    """Return the event that all work issued on the current stream so far is done."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def waited_for(stream: torch.cuda.Stream) -> None:
    """Let what is issued on the current stream from now on wait for what was issued on another."""
    torch.cuda.current_stream().wait_stream(stream)
