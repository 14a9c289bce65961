"""The page of a report: one file that needs no other."""

import base64
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from cqsa_stream.observers.status_text import status_text, verification_text
from cqsa_stream.report.pictures import Picture, pictures
from cqsa_stream.report.story import Story
from cqsa_stream.schedulers.plan_text import plan_text
from cqsa_stream.storage.atomic import make_directory, replace_file

__all__ = ["PAGE", "write_report"]

PAGE = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 0.85rem; line-height: 1.3; }
img { max-width: 100%; height: auto; }
figure { margin: 1.5rem 0; } figcaption { color: #404040; }
"""


def write_report(story: Story, folder: Path) -> list[Path]:
    """Write report.html and a PNG of each picture into a folder; return their paths, the page first."""
    make_directory(folder)
    made = pictures(story)
    files = [folder / PAGE, *(folder / f"{picture.name}.png" for picture in made)]
    for path, content in zip(files, [_page(story, made).encode(), *(picture.png for picture in made)], strict=True):
        replace_file(path, [content])
    return files


def _page(story: Story, made: Sequence[Picture]) -> str:
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(story.name)}: cqsa report</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(story.name)}</h1>\n<p>{escape(story.problem)}</p>\n<p>{escape(story.made)}</p>",
            *_sections(story, made),
            "</body>\n</html>\n",
        ]
    )


def _sections(story: Story, made: Sequence[Picture]) -> Iterator[str]:
    yield f"<h2>Where it stands</h2>\n<pre>{escape(status_text(story.status))}</pre>"
    yield "<h2>Verification</h2>"
    said = story.verification
    yield f"<p>{escape(said)}</p>" if isinstance(said, str) else f"<pre>{escape(verification_text(said))}</pre>"
    for picture in made:
        source = base64.b64encode(picture.png).decode()
        yield f"<h2>{escape(picture.title)}</h2>\n<figure>"
        yield f'<img alt="{escape(picture.alt)}" src="data:image/png;base64,{source}">'
        yield f"<figcaption>{escape(picture.alt)}</figcaption>\n</figure>"
    if story.plan:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # another version's, or no plan
            yield f"<h2>The plan of the last session</h2>\n<pre>{escape(plan_text(story.plan))}</pre>"
