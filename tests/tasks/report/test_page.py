"""The page of a run: everything measured, from hostile names too, without asking the network for anything."""

import dataclasses
import re

import numpy as np
import pytest

from functa.tasks.report.blocks import ReportData, Section, Table
from functa.tasks.report.page import Page as PageParts
from functa.tasks.report.page import write_page
from tests.helpers.tasks.report_page import Page, files_of, hostile, page_of


def test_every_part_is_on_the_page(full: ReportData) -> None:
    page = Page(page_of(full))
    assert not page.open
    for expected in ("30.8", "patch PCA 18.8 dB", "97.3", "10 % of the way from floor to ceiling", "7.31", "5,123",
                 "quantised to 8 bits", "error × ",
                 "Meta-train the field", "broken.png", "0f1e2d3c", "quantization.bits"):  # fmt: skip
        assert expected in page.text, expected
    identifiers = page.attributes("id")
    assert len(identifiers) == len(set(identifiers))
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert sum(tag == "img" for tag, _ in page.tags) == 3 * 10 + 5


@pytest.mark.attacks
def test_hostile_names_are_text(full: ReportData) -> None:
    text = page_of(hostile(full))
    page = Page(text)
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form", "link", "base"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {attributes["src"][:11] for tag, attributes in page.tags if tag == "img"} == {"data:image/"}
    assert text.count("alert(1)") == text.count("alert(1)&lt;/script&gt;") + text.count("onerror=alert(1)&gt;")
    text.encode()  # lone surrogates and NUL are spelt out
    assert "\x00" not in text and "\\x00" in text and "\\udcff" in text and "\\u202e" in text
    assert all(re.fullmatch(r"s[0-9a-f]+-\S+|[a-z]+", identifier) for identifier in page.attributes("id"))


@pytest.mark.attacks
def test_the_page_asks_the_network_for_nothing(full: ReportData) -> None:
    text = page_of(full)
    page = Page(text)
    for address in page.attributes("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
        assert address.startswith(("data:image/png;base64,", "#")), address[:80]
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http:" not in without_namespaces and "https:" not in without_namespaces and "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_links_on_the_page_lead_somewhere(full: ReportData) -> None:
    for data in (full, ReportData(title="nothing yet")):
        page = Page(page_of(data))
        assert {link[1:] for link in page.attributes("href", "xlink:href")} <= set(page.attributes("id"))


def test_figures_are_never_broken_and_long_texts_are() -> None:
    cells = ("1.25 dB", "x" * 41, "two words", "\u22120.01", 12, "\u2013", "failed")
    table = Table("t", "Table", tuple("abcdefg"), (cells, (*cells[:5], 1.5, "failed")))
    page = Page(write_page(PageParts("title"), [Section("s", "Section", "", (table,))]))
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert classes == ["figure", "long", None, "figure", "number", "number", "failed"] * 2
    alone = Page(
        write_page(PageParts("title"), [Section("s", "Section", "", (Table("t", "T", ("a",), (("\u2013",),)),))])
    )
    assert [attributes.get("class") for tag, attributes in alone.tags if tag == "td"] == [None]


def test_figures_that_were_not_measured_are_absent() -> None:
    page = Page(page_of(ReportData(title="nothing yet")))
    assert not page.open
    assert "Nothing has been measured yet." in page.text and "No reconstructions were made." in page.text
    body = page.text[page.text.index("Headline") :]
    assert not re.search(r"\d", body), "a figure where nothing was measured"


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(ReportData) if f.name != "title"])
def test_each_part_may_be_missing(full: ReportData, part: str) -> None:
    empty = getattr(ReportData(title=""), part)
    assert not Page(page_of(dataclasses.replace(full, **{part: empty}))).open


def test_empty_pictures_and_odd_curves_do_no_harm(full: ReportData) -> None:
    none = np.zeros((0, 8, 8, 1), np.uint8)
    odd = {"encode": [], "a": [{"step": 1}], "b": [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": -1.0}]}
    data = dataclasses.replace(
        full, originals=none, reconstructions=none, samples=none, psnr_per_image=np.array([np.inf]), curves=odd
    )
    assert not Page(page_of(data)).open
    assert set(files_of(data)) == {"curves_b.svg", "psnr_by_bits.svg"}
