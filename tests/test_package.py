"""The package as installed: every module in the wheel, one sorted public list, one direction of imports."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import cqsa_stream
from tests.conftest import ROOT

FOLDERS = {"cqsa_stream": "cqsa_stream", "storage": "cqsa_stream/storage", "schedulers": "cqsa_stream/schedulers"}


def modules() -> dict[str, Path]:
    """Return the path in a wheel and the source of every module."""
    found = {}
    for folder, installed in FOLDERS.items():
        for path in (ROOT / folder).glob("**/*.py"):
            relative = path.relative_to(ROOT / folder)
            if not (folder == "cqsa_stream" and relative.parts[0] in FOLDERS):
                found[f"{installed}/{relative}"] = path
    return found


ROOMS = (  # each imports rooms to its left only: a folder of cqsa_stream, or a file at its root
    "errors", "events", "scores", "masks", "problem", "kernels", "machine", "options", "engine", "operations",
    "planning", "inputs", "command", "observers", "verification", "report", "run", "executors", "generate", "create",
    "api", "integrations", "bench", "doctor", "commands", "cli", "__main__",
)  # fmt: skip


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, and the names it takes from them as if they were modules, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def graph() -> dict[str, set[str]]:
    """Return which of our modules each of them imports."""
    named = {
        installed.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path
        for installed, path in modules().items()
    }
    return {name: (imported(path) & set(named)) - {name} for name, path in named.items()}


def test_a_wheel_holds_every_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(modules()) <= names
    assert "cqsa_stream/py.typed" in names


def test_the_public_list_is_sorted_and_there() -> None:
    assert sorted(cqsa_stream.__all__) == cqsa_stream.__all__
    for name in cqsa_stream.__all__:
        assert getattr(cqsa_stream, name).__doc__, name


def test_arrows_run_one_way() -> None:
    for installed, path in modules().items():
        names = imported(path)
        ours = {name for name in names if name.startswith("cqsa_stream")}
        if installed.startswith("cqsa_stream/schedulers"):
            assert not {name for name in ours if not name.startswith("cqsa_stream.schedulers")}, path
            assert not names & {"torch", "os", "pathlib"}, path
            masks = "/masks/" in installed or installed.endswith("/runs.py")
            assert masks or "numpy" not in names, "numbers of many bands alone are arrays"
        if installed.startswith("cqsa_stream/storage"):
            assert not {name for name in ours if not name.startswith("cqsa_stream.storage")}, path
        assert not names & {"pickle", "marshal", "shelve", "dill"}, path


def test_there_is_no_circle() -> None:
    left = graph()
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left, "these import each other, in a circle or behind one"


def test_each_room_imports_those_before_it() -> None:
    def room(name: str) -> str:
        return [*name.split("."), ""][1]

    for name, needs in graph().items():
        if room(name) in ("", "storage", "schedulers"):
            continue
        for other in {room(needed) for needed in needs} - {room(name), "storage", "schedulers", ""}:
            assert ROOMS.index(other) < ROOMS.index(room(name)), f"{name} imports {other}"


def test_the_root_holds_few_files() -> None:
    assert len(list((ROOT / "cqsa_stream").glob("*.py"))) <= 17


def test_names_of_schedules_and_devices_are_compared_in_their_own_rooms() -> None:
    """A device is asked by its habits and verbs, a schedule by what it says of itself."""
    asked: dict[str, int] = {}
    for installed, path in modules().items():
        for node in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)):
            names = {part.value for part in (node.left, *node.comparators) if isinstance(part, ast.Constant)}
            assert not names & {"cqs", "rectangular"}, f"{path}:{node.lineno}"
            if names & {"cpu", "cuda"}:
                asked[installed] = asked.get(installed, 0) + 1
    assert all(name.startswith(("cqsa_stream/machine/", "cqsa_stream/kernels/")) for name in asked)
    assert sum(asked.values()) <= 12


def test_the_stop_words_of_security() -> None:
    for path in modules().values():
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"eval", "exec", "compile", "__import__"}, path


def test_files_stay_readable() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules().values()}
    assert {str(path): n for path, n in lengths.items() if n > 350} == {}
