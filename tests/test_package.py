"""The package as installed: every module in the wheel, one sorted public list, one direction of imports."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import cqsa_stream
from tests.conftest import ROOT, environment

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


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


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
        if installed.startswith("cqsa_stream/schedulers"):
            outside = {n for n in names if n.startswith("cqsa_stream") and not n.startswith("cqsa_stream.schedulers")}
            assert not outside, path
            assert not names & {"torch", "numpy", "os", "pathlib"}, path
        if installed.startswith("cqsa_stream/storage"):
            assert not {n for n in names if n.startswith("cqsa_stream") and not n.startswith("cqsa_stream.storage")}, (
                path
            )
        assert not names & {"pickle", "marshal", "shelve", "dill"}, path


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
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}


def test_the_python_example_runs() -> None:
    example = [sys.executable, str(ROOT / "examples" / "python_api.py")]
    found = subprocess.run(example, env=environment(), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "ok=True" in found.stdout
