"""Debian's chromium, driven by selenium."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

from tests.helpers.debian import install

PACKAGES = {"chromium": "chromium", "chromedriver": "chromium-driver"}
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


@contextlib.contextmanager
def chromium(*arguments: str) -> Iterator[Any]:
    """Start the browser, installed if that is allowed; else the test is skipped with the reason."""
    missing = [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    if missing:
        install(*missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (*ARGUMENTS, *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    driver.set_window_size(1500, 1200)
    try:
        yield driver
    finally:
        driver.quit()


def text_of(browser: Any) -> str:
    """Return the page's text in one line."""
    return " ".join(browser.find_element("tag name", "body").text.split())
