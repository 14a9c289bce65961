"""The options of the commands, and how ``plan`` and ``run`` come to have them all."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

__all__ = [
    "FLAGS",
    "RUN_OPTIONS",
    "AsJson",
    "Device",
    "Fetch",
    "Option",
    "Quiet",
    "RunDir",
    "Verbose",
    "with_run_options",
]

RunDir = Annotated[str, typer.Argument(metavar="RUN", help="The output of a run, or its run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:<number>.")]
Fetch = Annotated[bool, typer.Option("--fetch", help="Fetch inputs from the URLs in the run directory.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print the plan, and what limits each stage, too.")]


class Option(NamedTuple):
    """An option of `plan` and `run`, beside its word of `attention`. ``metavar`` None: as the parser names the kind."""

    flag: str
    kind: Any
    help: str
    default: Any = None
    metavar: str | None = None


_SIZE = 'As "4GiB" or "512MiB"; "4G" is 4e9 bytes.'
RUN_OPTIONS = {
    "is_causal": Option("--causal", bool, "Let a query see the keys up to its own position.", False),
    "window": Option("--window", int, "Let a query see so many keys: its own, and those before it.", metavar="KEYS"),
    "mask": Option("--mask", str, "Apply a mask, or several that are joined, as JSON.", metavar="FILE.json"),
    "documents": Option(
        "--documents", str, "Where packed documents begin, and the last one's end: .npy or .json.", metavar="FILE"
    ),
    "chunked": Option("--chunked", int, "Let a query see the keys of its own chunk of so many.", metavar="TOKENS"),
    "prefix": Option(
        "--prefix", int, "Let all queries see the first so many keys, and those up to their own position.",
        metavar="TOKENS",
    ),
    "soft_cap": Option("--soft-cap", float, "Scores s become CAP tanh(s / CAP).", metavar="CAP"),
    "alibi_slopes": Option("--alibi", str, "A slope for each query head: .npy or .json.", metavar="FILE"),
    "sinks": Option("--sinks", str, "A sink's score for each query head: .npy or .json.", metavar="FILE"),
    "layout": Option(
        "--layout", str, "Axes of the arrays: bhtd, or bthd as flash-attention's (b batch, h head).", "bhtd"
    ),
    "scale": Option("--scale", float, "Factor of the scores; 1/sqrt(head dim) by default."),
    "q_start": Option("--q-start", int, "Position of the first query row.", 0),
    "queries": Option("--queries", str, "Compute only the query rows A to B-1.", metavar="A:B"),
    "device": Option("--device", str, "auto, cpu, cuda (all), cuda:<number> or cuda:<number>,<number>."),
    "device_memory": Option("--device-memory", str, _SIZE, metavar="SIZE"),
    "host_memory": Option("--host-memory", str, f"{_SIZE} By default 80 % of what is free.", metavar="SIZE"),
    "schedule": Option("--schedule", str, "auto, cqs or rectangular."),
    "chunks": Option("--chunks", int, "Number of chunks: 7, 13, 21, 31, 57, ..."),
    "fill_missing": Option("--fill-missing", bool, "Read missing stored chunks as the fill value.", False),
    "out_dtype": Option("--out-dtype", str, "float32, float16 or bfloat16; by default the inputs'."),
    "checkpoint_every_s": Option(
        "--checkpoint-every", str, "Seconds, or 5m or 1h; by default 60.", metavar="TIME"
    ),
    "max_seconds": Option("--max-seconds", str, "Stop, resumable, after so long: 90, 5m or 1h.", metavar="TIME"),
    "shares": Option("--shares", int, "Deal the tasks into so many shares: workers take them, and they fix the bits."),
    "workers": Option("--workers", int, "Processes that share the work and the memory; one for each device."),
    "executor": Option("--executor", str, "local: processes of this machine; ray: actors of a cluster."),
    "address": Option("--address", str, "Of the Ray cluster, as auto; without it one begins on this machine."),
    "kernel": Option("--kernel", str, "auto; on CUDA also fa4, torch-cuda; to compare with: online, cupy."),
    "lse": Option("--lse", str, "Where the log-sum-exp goes; by default into the run directory."),
    "run_dir": Option("--run-dir", str, "By default OUT.run."),
    "fresh": Option("--fresh", bool, "Discard the earlier run of OUT and its output.", False),
}  # fmt: skip
FLAGS = {name: option.flag for name, option in RUN_OPTIONS.items()} | {
    name: f"--{name}" for name in ("fetch", "worker", "rows", "seed")
}
_PLACES = {"query": "Q", "key": "K", "value": "V"}


def with_run_options(optional: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare Q, K, V and the run options in the place of a command's ``**words``: the parser reads the signature.

    ``optional``: the arrays need not be named.
    """
    parameter = inspect.Parameter

    def declare(command: Callable[..., None]) -> Callable[..., None]:
        kind: Any = str | None if optional else str
        default = None if optional else parameter.empty
        declared = [
            parameter(
                word,
                parameter.POSITIONAL_OR_KEYWORD,
                default=default,
                annotation=Annotated[kind, typer.Argument(metavar=name, help="An array: a path or URL.")],
            )
            for word, name in _PLACES.items()
        ]
        declared += [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
        for word, (flag, kind, explained, default, metavar) in RUN_OPTIONS.items():
            option = typer.Option(flag, help=explained, metavar=metavar)
            hint = Annotated[kind if default is not None else kind | None, option]  # type: ignore[valid-type]
            declared.append(parameter(word, parameter.KEYWORD_ONLY, default=default, annotation=hint))
        command.__signature__ = inspect.Signature(sorted(declared, key=lambda p: p.kind))  # type: ignore[attr-defined]
        return command

    return declare
