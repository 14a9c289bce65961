"""How much code there is: lines without blanks, comments and docstrings, by folder and for the path of one run.

    python benchmarks/code_lines.py [--files]

The path of one run is what docs/design.md lists: the files through which a chunk of keys and a partial walk.
"""

import argparse
import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cqsa_stream", "storage", "schedulers")
_NO_CODE = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
)  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(path: Path) -> int:
    """Return the lines of a file that hold code."""
    source = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False):
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(lines)


def files() -> list[Path]:
    """Return the product's files; the links to storage and schedulers are left out."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not any(parent.is_symlink() for parent in path.parents)]


def walk() -> list[Path]:
    """Return the files that the design page lists as the path of one run."""
    page = (ROOT / "docs" / "design.md").read_text()
    listed = page.partition("## The walk of a chunk")[2].partition("\n## ")[0]
    return [ROOT / name for name in dict.fromkeys(re.findall(r"`([a-z_/]+\.py)`", listed))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="each file, too")
    arguments = parser.parse_args()
    counts = {path: code_lines(path) for path in files()}
    if arguments.files:
        for path, count in counts.items():
            print(f"{count:6} {path.relative_to(ROOT)}")
    for folder in FOLDERS:
        print(f"{sum(n for path, n in counts.items() if path.relative_to(ROOT).parts[0] == folder):6} {folder}")
    print(f"{sum(counts.values()):6} all")
    print(f"{sum(map(code_lines, walk())):6} the path of one run, {len(walk())} files")


if __name__ == "__main__":
    main()
