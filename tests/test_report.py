"""The page about a run, its pictures, and what looks at this machine."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import cqsa_stream as cqsa
from cqsa_stream.doctor import _advice, examine
from tests.conftest import Cli, stopping_after

PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Collects what a page shows and fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        self.fetched += [str(v) for name, v in attrs if name in ("src", "href") and not str(v).startswith("data:")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in "qkv":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).standard_normal((1, 2, 3000, 32), np.float32))
    q, k, v = (tmp_path / f"{name}.npy" for name in "qkv")
    with stopping_after(4), pytest.raises(cqsa.RunStopped):
        cqsa.attention(q, k, v, is_causal=True, out=tmp_path / "<o>", chunks=7, device="cpu", host_memory="64MiB")
    return tmp_path / "<o>"


def resumed(run: Path) -> None:
    q, k, v = (run.parent / f"{name}.npy" for name in "qkv")
    cqsa.attention(q, k, v, is_causal=True, out=run, device="cpu")


def test_a_report_is_one_page_and_its_pictures(run: Path, tmp_path: Path) -> None:
    resumed(run)
    page, *pictures = cqsa.open_run(run).report(tmp_path / "r")
    assert page == tmp_path / "r" / "report.html"
    assert {path.stem for path in pictures} == {"pairs", "memory", "throughput", "timeline", "predicted"}
    assert all(path.read_bytes().startswith(PNG) for path in pictures)
    found = Page()
    found.feed(page.read_text())
    assert found.fetched == [], "it needs no other file, and nothing from elsewhere"
    assert len(found.images) == len(pictures)
    for image in found.images:
        assert len(str(image["alt"])) > 20
        assert base64.b64decode(str(image["src"]).partition("base64,")[2]).startswith(PNG)
    for said in ("<o>", "verification: ok", "pairs are done", "complete  100 %", "predicted", "fits: host memory"):
        assert said in found.text, said


def test_a_report_of_a_run_that_stopped(run: Path) -> None:
    page, *_ = cqsa.open_run(run).report()
    assert page == run.with_name("<o>.report") / "report.html"
    found = Page()
    found.feed(page.read_text())
    assert "stopped" in found.text
    cqsa.open_run(run).report()  # again, in the same place


def test_a_report_needs_neither_inputs_nor_news(run: Path, tmp_path: Path) -> None:
    resumed(run)
    for path in (
        tmp_path / "q.npy",
        *(Path(f"{run}.run") / n for n in ("events.jsonl", "timeline.json", "session.json")),
    ):
        path.unlink()
    page, *_ = cqsa.open_run(run).report(tmp_path / "r")
    assert "not verified: query:" in page.read_text()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"spans": 3}', '{"spans": [[1, 2]]}', '{"spans": [["a", "b", NaN, 1, ""]]}']
)
def test_nonsense_in_the_news_is_left_out(content: str, run: Path, tmp_path: Path) -> None:
    resumed(run)
    (Path(f"{run}.run") / "timeline.json").write_text(content)
    (Path(f"{run}.run") / "events.jsonl").write_text(f'{{"event": "started", "plan": 7}}\n{content}\n')
    assert cqsa.open_run(run).report(tmp_path / "r")[0].exists()


def test_ink_and_paper_differ_enough() -> None:
    """The contrast of text is 7 to 1 or more, and of what is drawn 3 to 1: WCAG's AAA, and AA for graphics."""
    from cqsa_stream.report.page import _STYLE
    from cqsa_stream.report.pictures import _COLORS, _INK

    def luminance(color: str) -> float:
        channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    inks = re.findall(r"[^-]color: (#[0-9a-f]{6})", _STYLE)
    assert inks
    for ink in (*inks, _INK):
        assert contrast(ink, "#f4f4f4") >= 7
    for name in ("compute", "disk reads", "disk writes"):
        assert contrast(_COLORS[name], "#ffffff") >= 3


def test_a_doctor_names_neither_users_nor_paths(cli: Cli, tmp_path: Path) -> None:
    found = cli("doctor", "--json")
    assert found.returncode == 0, found.stderr
    for secret in (str(Path.home()), str(tmp_path), "/tmp"):
        assert secret not in found.stdout
    report = json.loads(found.stdout)
    assert report["versions"]["torch"]
    assert report["devices"][0]["kernels"]["float32"]["chosen"] == "torch-cpu"
    assert report["memory_bytes_per_s"] > 0
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    assert "check       exact on cpu" in cli("doctor").stdout


def test_a_doctor_finds_what_is_not_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr("cqsa_stream.doctor.attention", lambda q, *_, **__: torch.zeros_like(q))
    found = examine(tmp_path)
    assert not found["exact"]["ok"]
    assert any("not exact" in advice for advice in found["advice"])
    full = {**found, "host_free_bytes": 0, "disk": {"free_bytes": 0}}
    assert sum("are free" in advice for advice in _advice(full)) == 2
