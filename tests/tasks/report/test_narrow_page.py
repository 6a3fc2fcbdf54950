"""The report on a phone, in Debian's chromium: tables break between words alone, and scroll inside their card."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import GENERATED, classified, page_of

pytestmark = pytest.mark.browser

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
# Words that lie on more than one line, in cells whose text is not long.
BROKEN = """
const broken = [];
document.querySelectorAll("details").forEach(each => each.open = true);
for (const cell of document.querySelectorAll("th, td:not(.long)")) {
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();)
    for (const word of node.data.matchAll(cell.matches("td.number, td.figure") ? /\\S.*/g : /\\S+/g)) {
      const range = document.createRange();
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      const lines = new Set([...range.getClientRects()].map(each => Math.round(each.top)));
      if (lines.size > 1 && !(word[0].includes("-") && !/\\d/.test(word[0]))) broken.push(word[0]);
    }
}
return broken;
"""
INSIDE = """
return [...document.querySelectorAll(".scroll")].every(each => each.getBoundingClientRect().right <= innerWidth);
"""


@pytest.fixture(scope="module")
def phone() -> Iterator[Any]:
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    yield driver
    driver.quit()


def test_no_word_and_no_figure_is_broken_and_the_page_is_as_wide_as_the_phone(
    full: ReportData, phone: Any, tmp_path: Path
) -> None:
    names = [f"class-{number} of many" for number in range(10)]
    data = dataclasses.replace(
        classified(full, names), metrics=GENERATED | {"fd_reconstruction": {"latent": 0.0080123}}
    )
    (tmp_path / "report.html").write_text(page_of(data), encoding="utf-8")
    phone.get(f"file://{tmp_path}/report.html")
    assert phone.execute_script(BROKEN) == []
    assert phone.execute_script("return document.documentElement.scrollWidth") == PHONE["width"]
    assert phone.execute_script(INSIDE)
