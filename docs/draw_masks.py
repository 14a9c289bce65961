"""Draw a picture of each mask from its bands: ``docs/masks/<name>.svg``.

    python docs/draw_masks.py

Rows are queries, from the top; columns are keys, from the left. Each band has a colour and an outline of its own.
"""

from collections.abc import Iterator
from html import escape
from itertools import cycle
from pathlib import Path

from cqsa_stream import masks
from cqsa_stream.schedulers.masks.band import Band

FOLDER = Path(__file__).parent / "masks"
TOKENS, PIXELS = 32, 5  # of a picture's side, and of a token
SIDE, MARGIN = TOKENS * PIXELS, 2
COLOURS = (
    ("#bcd7f0", "#2f6ea5"), ("#f7d6a8", "#a8691a"), ("#c9e4bd", "#4b8438"), ("#e3c8ea", "#81479a"),
    ("#f5c4c0", "#a8413a"), ("#c2e5e2", "#2b807a"),
)  # fmt: skip
CAUSAL = masks.Window(None, 0)
DOCUMENTS = masks.Documents([0, 5, 17, 21, 32])
BITMAP = [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
GLOBAL_AND_LOCAL = [(0, 4, 0, 32, None, None), (4, 32, 0, 4, None, None), (4, 32, 4, 32, -5, 5)]
PICTURES: dict[str, tuple[masks.Rule, str]] = {
    "full": (masks.Window(None, None), "Full: a query sees all keys"),
    "causal": (CAUSAL, "Causal: a query sees the keys up to its own position"),
    "window": (masks.Window(7, 0), "Causal window: a query sees the last 8 keys, its own among them"),
    "two-sided-window": (masks.Window(6, 3), "Two-sided window: a query sees 6 keys before its own and 3 after it"),
    "documents": (DOCUMENTS, "Documents: a query sees the keys of its own document"),
    "documents-causal": (DOCUMENTS & CAUSAL, "Documents and causal: in its document, the keys up to its position"),
    "chunked-causal": (masks.Chunked(10) & CAUSAL, "Chunked and causal: in its chunk, the keys up to its position"),
    "prefix": (masks.Prefix(10), "Prefix: a query sees the first 10 keys, and the keys up to its own position"),
    "strip": (masks.Strip(3, 8), "Strip: a query sees the first 3 keys and the last 8, up to its own position"),
    "blocks": (masks.Blocks(BITMAP, 8), "Blocks: a bitmap says which blocks of keys a block of queries sees"),
    "bands": (masks.Bands(GLOBAL_AND_LOCAL), "Bands: a list by hand, here 4 global tokens and a local window"),
}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, (rule, title) in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        path.write_text(picture(rule, title), encoding="utf-8")
        print(f"{path.relative_to(FOLDER.parent)}: {path.stat().st_size:,} bytes")


def picture(rule: masks.Rule, title: str) -> str:
    """Return the SVG of a mask of as many queries as keys."""
    bands = list(rule.over(range(TOKENS), TOKENS))
    count = f"{len(bands)} band{'s' * (len(bands) != 1)}"
    whole = SIDE + 2 * MARGIN
    lines = "".join(f"M{n} 0V{SIDE}M0 {n}H{SIDE}" for n in range(PIXELS, SIDE, PIXELS))
    paths = [
        f'<path d="{outline(band)}" fill="{fill}" stroke="{stroke}"/>'
        for band, (fill, stroke) in zip(bands, cycle(COLOURS), strict=False)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{whole}" height="{whole}" '
            f'viewBox="{-MARGIN} {-MARGIN} {whole} {whole}">',
            f"<title>{escape(title)}. {count}.</title>",
            f'<path d="M0 0H{SIDE}V{SIDE}H0Z" fill="#fff" stroke="#8a8f98"/>',
            *paths,
            f'<path d="{lines}" fill="none" stroke="#667" stroke-opacity=".22" stroke-width=".5"/>',
            "</svg>\n",
        ]
    )


def outline(band: Band) -> str:
    """Return the path around the scores of a band: down along the last keys of its rows, up along the first ones."""
    seen = list(seen_by_rows(band))
    right = [(stop, y) for row, _, stop in seen for y in (row, row + 1)]
    left = [(first, y) for row, first, _ in reversed(seen) for y in (row + 1, row)]
    points = [*right, *left]
    # a corner is where the path turns: along a straight edge the points between are left out
    kept = [
        here
        for before, here, after in zip([points[-1], *points], points, [*points[1:], points[0]], strict=False)
        if not (before[0] == here[0] == after[0] or before[1] == here[1] == after[1])
    ]
    return "M" + "L".join(f"{x * PIXELS} {y * PIXELS}" for x, y in kept) + "Z"


def seen_by_rows(band: Band) -> Iterator[tuple[int, int, int]]:
    """Yield (row, first key, end) of each row of a band."""
    for row in band.rows:
        first = band.c0 if band.lo is None else max(band.c0, row + band.lo)
        stop = band.c1 if band.hi is None else min(band.c1, row + band.hi + 1)
        yield row, first, stop


if __name__ == "__main__":
    main()
