"""Write the pages of the reference that are made from the code: the help of the commands, and the errors' messages.

python docs/reference.py          writes them
python docs/reference.py --check  fails where they are not what the code says
"""

import ast
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "reference"
BEGIN, END = "<!-- made by docs/reference.py -->\n", "<!-- end -->\n"
COMMANDS = ("generate", "plan", "run", "work", "finish", "status", "verify", "report", "doctor", "bench")
ERRORS = {  # class: (exit code, when it is raised, what to do where the message has no more to say)
    "InputError": (2, "An option or an argument cannot be. Nothing was written.", "Name what the message expects."),
    "ArrayError": (2, "An array cannot be opened or read.", "Look at the file that the message names."),
    "BudgetError": (4, "No plan fits the memory: `no plan fits: ...`.", "Allow what the message names, or free some."),
    "LockedError": (5, "Another process works there.", "Wait for it, or stop it."),
    "MismatchError": (6, "The inputs or the problem are not those of the run.", "Bring them back, or begin anew."),
    "NoMemoryError": (1, "Memory ran out; a run on disk is intact.", "Name a smaller budget, and run it again."),
    "FullDiskError": (3, "The disk is full; the run is intact.", "Make room, and run the same command again."),
    "RunStopped": (3, "A time limit or a signal stopped the run.", "Run the same command again."),
    "CqsaError": (1, "Something else failed.", "Run the same command again."),
}


def main() -> None:
    stale = []
    for name, make in (("cli.md", command_pages), ("errors.md", error_pages)):
        page = PAGES / name
        before, _, rest = page.read_text().partition(BEGIN)
        made = before + BEGIN + "\n".join(make()) + END + rest.partition(END)[2]
        if made != page.read_text():
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv:
                page.write_text(made)
    if stale and "--check" in sys.argv:
        sys.exit(f"not what the code says: {', '.join(stale)}; run python docs/reference.py")


def command_pages() -> Iterator[str]:
    """Yield the help of every command."""
    for command in ("", *COMMANDS):
        words = [sys.executable, "-m", "cqsa_stream", *filter(None, [command]), "--help"]
        wide = {**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
        found = subprocess.run(words, capture_output=True, text=True, check=True, env=wide)
        shown = "\n".join(map(str.rstrip, found.stdout.replace("python -m cqsa_stream", "cqsa").rstrip().splitlines()))
        yield f"## cqsa {command}".rstrip()
        yield f"\n```text\n{shown}\n```\n"


def error_pages() -> Iterator[str]:
    """Yield the messages of every class of errors, each with its cure."""
    messages = messages_of_errors()
    for name, (code, when, cure) in ERRORS.items():
        yield f"## {name} (exit code {code})\n\n{when} {cure}\n"
        if not messages[name]:
            continue
        yield "| message | cure |\n|---|---|"
        for message in sorted(messages[name]):
            said, _, then = message.partition("; ")
            yield f"| {_cell(said)} | {_cell(then) if then else cure} |"
        yield ""


def messages_of_errors() -> dict[str, set[str]]:
    """Return the messages that the code can raise, by class; what is filled in stands in <brackets>."""
    found: dict[str, set[str]] = defaultdict(set)
    for folder in ("cqsa_stream", "storage", "schedulers"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in ERRORS
                    and node.args
                ):
                    message = _text(node.args[-1])
                    if len(re.sub(r"<[^>]*>", "", message)) > 8:  # more than what another error said
                        found[node.func.id].add(message)
    return found


def _text(node: ast.expr) -> str:
    """Return a message as its readers meet it, but for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    name = ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)
    words = re.sub(r"[^a-z_]", " ", name.rpartition(".")[2].lower()).split()
    return f"<{words[0]}>" if len(words) == 1 else "<...>"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*").replace("_", "\\_")


if __name__ == "__main__":
    main()
