"""A real headless Chromium, for pages that are files."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

FLAGS = (
    "--no-sandbox",  # it runs as root in CI
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def opened(file: Path, *, color_scheme: str = "light", width: int = 1100, height: int = 900) -> Iterator[Page]:
    """`file` in a browser of the system, or in the one that `playwright install chromium` brought.

    `page.requested` lists the addresses that were asked for, `page.complaints` what stood on the console.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=installed, args=list(FLAGS))
        page = browser.new_page(
            color_scheme=color_scheme, viewport={"width": width, "height": height}, device_scale_factor=1.5
        )
        page.requested, page.complaints = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(file.resolve().as_uri())
        yield page
        browser.close()
