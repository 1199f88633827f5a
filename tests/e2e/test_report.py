"""The report of a run and of three methods, made by the command and opened in a real browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from browser import make_report, needs_browser, visit
from launching import fedex_scale, python

METHODS = ("fedex", "fedit", "ffa")


@pytest.fixture(scope="module")
def runs(tiny_config: Path) -> list[Path]:
    """Three tiny runs, each scored before and after."""
    program = (
        "import sys; from fedex_scale.run import run_config\n"
        "for name in sys.argv[2:]:\n"
        "    named = [f'run.name={name}', f'method.name={name}']\n"
        "    run_config(sys.argv[1], [*named, 'evaluation.limit=1', 'data.num_examples=12'])"
    )
    done = python("-c", program, tiny_config, *METHODS)
    assert done.returncode == 0, done.stderr
    return [tiny_config.parent / "runs" / method for method in METHODS]


@pytest.fixture(scope="module")
def single(runs: list[Path]) -> Path:
    return make_report(runs[0])


@pytest.fixture(scope="module")
def comparison(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_report(*runs, "--out", tmp_path_factory.mktemp("report") / "comparison")


def test_figures_are_saved_with_their_numbers(single: Path) -> None:
    files = sorted((single.parent / "plots").iterdir())
    names = {file.stem for file in files}
    assert {"scores", "fedex-loss", "fedex-deviation-depth", "fedex-time"} <= names
    for name in names:
        kinds = {file.suffix for file in files if file.stem == name}
        assert kinds == {".csv", ".png", ".svg"}
    rows = (single.parent / "plots" / "fedex-loss.csv").read_text().splitlines()
    assert "fedex-learning-rate" in names
    assert rows[0] == "round,client,step,loss,lr,tokens"
    assert len(rows) == 1 + 2 * 3  # rounds and clients, with a step each


def test_page_holds_everything_itself(single: Path, comparison: Path) -> None:
    for page in (single, comparison):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<script|<iframe|@import|url\(\s*[\"']?(?!#)", text)
        linked = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert all(x.startswith(("#", "data:")) for x in linked), set(linked)
        assert page.stat().st_size < 2e6


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("which", ["single", "comparison"])
def test_browser_shows_it_without_an_error_or_a_request(
    which: str, dark: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    page = request.getfixturevalue(which)
    seen = visit(page, tmp_path, dark=dark)
    assert seen.console == []
    assert seen.requests == []
    assert is_dark(seen.screenshot) == dark


@needs_browser
@pytest.mark.parametrize("width", [375, 1200])
@pytest.mark.parametrize("which", ["single", "comparison"])
def test_nothing_is_cut_and_nobody_scrolls_sideways(
    which: str, width: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text = request.getfixturevalue(which).read_text(encoding="utf-8")
    script = (
        "<script>const cut = [...document.querySelectorAll('.scroll')]"
        ".filter(x => x.scrollWidth > x.clientWidth).length;"
        "console.log(`width ${document.documentElement.scrollWidth}, cut ${cut}`)</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"))
    frame = f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(frame)
    assert visit(tmp_path / "frame.html", tmp_path).console == [f"width {width}, cut 0"]


@needs_browser
def test_this_test_would_see_errors_and_requests(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://example.invalid/x.png"><script>console.error("no")</script>')
    seen = visit(page, tmp_path)
    assert seen.console == ["no"]
    assert seen.requests == ["http://example.invalid/x.png"]


def test_unfinished_run_says_so(runs: list[Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(runs[0], cut)
    shutil.rmtree(cut / "final")
    shutil.rmtree(cut / "server" / "round-0002")
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"event": "st')
    text = make_report(cut).read_text(encoding="utf-8")
    assert "This run has not finished: 1 of 2 rounds done." in text
    assert "Training loss of each client" in text


@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_what_is_no_run_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    done = fedex_scale("report", tmp_path / name)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / name}: expected a run directory")
    assert done.stderr.count("\n") == 1


def is_dark(screenshot: Path) -> bool:
    """Tell by the corner, which is the page's background."""
    from PIL import Image  # matplotlib brings it

    with Image.open(screenshot) as image:
        return max(image.convert("RGB").getpixel((3, 3))) < 64
