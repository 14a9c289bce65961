"""Messages name options as Python does; the command line shows them as flags."""

import ast
import re

import pytest

from cqsa_stream.commands.telling import in_flags
from tests.test_package import modules


def test_messages_name_options_as_python_does() -> None:
    """The command line makes flags of them: no message may name a flag itself, but for what only it has."""
    allowed = ("--shape", "--worker", "python -m")
    for installed, path in modules().items():
        if installed.startswith("cqsa_stream/commands"):
            continue
        for node in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise | ast.Call)):
            told = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning"
            if isinstance(node, ast.Raise) or told:
                parts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                flags = {flag for part in parts if isinstance(part, str) for flag in re.findall(r"--[a-z]+", part)}
                assert flags <= set(allowed), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        ('no plan fits; the smallest: host_memory="48MiB"', "no plan fits; the smallest: --host-memory 48MiB"),
        ("start anew with fresh=True", "start anew with --fresh"),
        ("or take fill_missing=True.", "or take --fill-missing."),
        ("queries 5:400; expected 0 <= A", "--queries 5:400; expected 0 <= A"),
        ("window 0; expected", "--window 0; expected"),
        ("mask: found a list", "--mask: found a list"),
        ("checkpoint_every_s -1.0; expected", "--checkpoint-every -1.0; expected"),
        ("is_causal 3; expected", "--causal 3; expected"),
        ("take a smaller device_memory", "take a smaller --device-memory"),
        ("device memory 1.0 MiB allowed", "device memory 1.0 MiB allowed"),
        ("/tmp/host_memory/x: no such file", "/tmp/host_memory/x: no such file"),
        ("key: dtype int32; expected", "key: dtype int32; expected"),
        ('take layout="bthd"', "take --layout bthd"),
        ("value: /tmp/seed=1/none.zarr: no such file", "value: /tmp/seed=1/none.zarr: no such file"),
        ("flush failed (fresh=False)", "flush failed (fresh=False)"),
    ],
)
def test_messages_of_the_command_line(python: str, flags: str) -> None:
    assert in_flags(python) == flags


@pytest.mark.parametrize("text", ["worker 1 was killed by SIGKILL", "lse is complete", "address already in use"])
def test_other_messages_may_begin_with_the_name_of_an_option(text: str) -> None:
    assert in_flags(text, of_input=False) == text
