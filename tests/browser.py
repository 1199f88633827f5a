"""A real browser that opens a report, and what it said about it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import fedex_scale

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")


@dataclass
class Visit:
    """What a browser said while it showed a page: console lines, and requests of the page."""

    console: list[str]
    requests: list[str]
    screenshot: Path


def make_report(*arguments: str | Path) -> Path:
    done = fedex_scale("report", *arguments)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip())
    assert page.name == "report.html"
    return page


def visit(page: Path, folder: Path, *, dark: bool = False) -> Visit:
    """Open a page; chromium's own requests, which no page initiated, do not count."""
    log, shot = folder / "net.json", folder / "page.png"
    options = (
        "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--disable-extensions --enable-logging=stderr --virtual-time-budget=2000"
    ).split()
    options += [f"--log-net-log={log}", f"--screenshot={shot}", "--window-size=1280,2400"]
    options += [f"--user-data-dir={folder / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    if dark:
        options.append("--blink-settings=preferredColorScheme=0")
    done = subprocess.run(
        [BROWSER, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    console = re.findall(r':CONSOLE[^\]]*\] "(.*)", source:', done.stderr)
    requests = []
    for event in json.loads(log.read_text())["events"]:
        parameters = event.get("params", {})
        if parameters.get("initiator", "not an origin") != "not an origin":
            requests.append(parameters["url"])
    return Visit(console, [url for url in requests if not url.startswith("file:")], shot)
