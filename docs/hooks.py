"""What mkdocs does beside its own work: links out of docs/ become plain names of files."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DECISIONS = "<!-- decisions -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Name files outside docs/ instead of linking to them, and list the records of decisions."""
    folder = Path(page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        text, link = match.groups()
        target = (ROOT / "docs" / folder / link.partition("#")[0]).resolve()
        if target.is_relative_to(ROOT / "docs") and target.suffix != ".py":
            return match[0]
        name = str(target.relative_to(ROOT))
        return f"`{name}`" if text == name else f"{text} (`{name}`)"

    records = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    links = (f"- [{path.read_text().splitlines()[0].lstrip('# ')}]({path.name})" for path in records)
    markdown = markdown.replace(DECISIONS, "\n".join(links))
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#)([^)\s]+)\)", named, markdown)
