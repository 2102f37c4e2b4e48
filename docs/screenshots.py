"""Take the pictures of the console in docs/assets, from a server of the shipped model at work.

    python -m docs.screenshots

Needs Chromium and the extra `dev`. The pictures are committed; nothing checks that they are fresh.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import sync_playwright

from benchmarks.harness.servers import ServerProcess
from emo_serve import demo

__all__ = ["main"]

_PICTURES = Path(__file__).resolve().parent / "assets"
_POOLS = ("python", "math", "c", "python", "spanish", "math")
_SERVE = ("serve", "--expert-slots", "18", "--enforce-eager")
_CURVE = "python@2, python@4, python, python@16, spanish@4, spanish, spanish@16"
_WIDE, _NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
_PATIENCE_MILLISECONDS = 240_000.0


def main() -> None:
    """Start a server, keep it busy, take the pictures."""
    command = [sys.executable, "-m", "emo_serve", *_SERVE]
    with ServerProcess(command) as server, sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"))
        with _busy(server.url):
            _take(browser, server.url, "light", "residency", _WIDE)
            _take(browser, server.url, "dark", "pool/python", _WIDE)
            _take(browser, server.url, "narrow", "residency", _NARROW)
        _take_curve(browser, server.url)
        browser.close()


@contextmanager
def _busy(url: str) -> Iterator[None]:
    """Ask one pool after the other, until the block ends."""
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=300) as client:
            for number, pool in enumerate(cycle(_POOLS)):
                if is_over.is_set():
                    return
                body = {"model": pool, "prompt": f"{number}: ", "max_tokens": 48}
                client.post("/v1/completions", json=body).raise_for_status()

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield
    finally:
        is_over.set()
        asking.join()


def _take(browser: Any, url: str, name: str, view: str, size: dict[str, int]) -> None:
    theme = "dark" if name == "dark" else "light"
    page = browser.new_page(viewport=size, color_scheme=theme)
    page.set_default_timeout(_PATIENCE_MILLISECONDS)
    page.goto(f"{url}/console#{view}")
    page.locator("tbody tr:visible").nth(3).wait_for()  # the view's table has been filled
    page.wait_for_timeout(3000)  # for something to happen
    page.screenshot(path=_PICTURES / f"console-{name}.png")
    page.close()


def _take_curve(browser: Any, url: str) -> None:
    page = browser.new_page(viewport=_WIDE, color_scheme="light")
    page.set_default_timeout(_PATIENCE_MILLISECONDS)
    page.goto(f"{url}/console#memory")
    page.get_by_label("Held-out text").fill(_heldout("python"))
    page.get_by_label("Pools and sizes").fill(_CURVE)
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("Done:").or_(page.get_by_text("Not measured:")).wait_for()
    assert page.get_by_text("Done:").is_visible(), page.get_by_role("status").all_inner_texts()
    page.screenshot(path=_PICTURES / "console-memory.png", full_page=True)
    page.close()


def _heldout(domain: str) -> str:
    lines = (demo.heldout_dir() / f"{domain}.jsonl").read_text().splitlines()
    return "\n\n".join(json.loads(line)["text"] for line in lines[:4])


if __name__ == "__main__":
    main()
