"""Check that every relative link in the documents leads to a file that is there."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
        if not (document.parent / link).exists()
    ]
    if broken:
        sys.exit("broken links:\n" + "\n".join(broken))
    print("every link leads somewhere")


if __name__ == "__main__":
    main()
