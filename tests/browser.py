"""A browser for tests of pages."""

import json
from pathlib import Path
from time import monotonic, sleep
from typing import Any

__all__ = ["Browser"]


class Browser:
    """
    Chromium without a window, by its driver.

    It may use the network, so that an attempt would show.
    """

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = "/usr/bin/chromium"
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-dev-shm-usage",
            "--window-size=1400,1500",
            f"--user-data-dir={profile}",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))

    def open(self, path: Path) -> None:
        """Open a page; wait until its picture is drawn."""
        self._page = path.as_uri()
        self.driver.get(self._page)
        self.wait_for("return document.body.dataset.ready")

    def wait_for(self, script: str) -> Any:
        """Wait until a script returns something that is true; return it."""
        deadline = monotonic() + 60
        while not (value := self.run(script)):
            assert monotonic() < deadline, script
            sleep(0.05)
        return value

    def run(self, script: str) -> Any:
        """Run a script in the page."""
        return self.driver.execute_script(script)

    def _log(self, name: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.get_log(name)  # type: ignore[no-untyped-call]
        return entries

    def complaints(self) -> list[str]:
        """Return what the console has."""
        return [entry["message"] for entry in self._log("browser")]

    def requests(self) -> set[str]:
        """Return the kinds of addresses that were asked for, outside the page itself."""
        messages = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        kinds = {
            message["params"]["request"]["url"].partition(":")[0]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
            and message["params"]["documentURL"] == self._page  # it has a first page of its own
        }
        return kinds - {"data", "blob"}  # pieces of the page: plotly.js tries an image of one pixel
