"""A headless browser for tests; they are skipped, saying so, where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
import shutil
from threading import Thread
from typing import Any
from wsgiref.simple_server import make_server, WSGIRequestHandler

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A selenium driver of Chromium from the system's packages."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no chromium with its chromedriver was found")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1500,2400")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    found = webdriver.Chrome(options=options, service=service)
    try:
        yield found
    finally:
        found.quit()


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def served(application: Any) -> Iterator[str]:
    """The address at which a WSGI application is served."""
    server = make_server("127.0.0.1", 0, application, handler_class=_Quiet)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()


def wait_for(driver: Any, script: str, *arguments: Any) -> Any:
    """Return what a script gives as soon as it is not empty.

    Raises:
        TimeoutException: If it stays empty for a minute.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(driver, 60, poll_frequency=0.1)
    return waiting.until(lambda d: d.execute_script(script, *arguments))


def faults(driver: Any) -> list[str]:
    """Return the errors in the browser's console."""
    entries = driver.get_log("browser")
    return [
        e["message"] for e in entries if e["level"] == "SEVERE" and "favicon" not in e["message"]
    ]
