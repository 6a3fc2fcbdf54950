"""Classification in the report."""

from functa.tasks.report.blocks import ReportData
from tests.helpers.tasks.report_page import HOSTILE, Page, classified, files_of, hostile, page_of


def test_the_classes_have_a_matrix_a_diagram_and_a_table(full: ReportData) -> None:
    data = classified(full, [f"kind {n}" for n in range(10)], empty=4)
    page = Page(page_of(data))
    assert not page.open
    for expected in ("Classification", "kind 3", "no test images", "kind 6 (10.0 %)",
                 "Without test images, so without an accuracy: kind 4.",
                 "calibration error 1.2 %"):  # fmt: skip
        assert expected in page.text, expected
    drawn = files_of(data)
    assert {"confusion.svg", "reliability.svg", "classes.csv"} <= set(drawn)
    assert drawn["classes.csv"].decode().splitlines()[-1] == "kind 4,0,no test images,"


def test_of_many_classes_the_worst_pairs_are_listed(full: ReportData) -> None:
    drawn = files_of(classified(full, [f"kind {n}" for n in range(21)]))
    assert "confusion.svg" not in drawn
    rows = drawn["confused_pairs.csv"].decode().splitlines()
    assert len(rows) == 1 + 20 and rows[1] == "kind 0,kind 1,10,10.0 %"


def test_hostile_class_names_are_harmless_in_figures_and_files(full: ReportData) -> None:
    names = [f"{HOSTILE} {n}" for n in range(3)] + ["\ud800", "$x_1", "=1+1"]
    data = hostile(classified(full, names))
    data.metrics["accuracy_by_class"] = dict.fromkeys(names, 0.9)
    page = Page(page_of(data))
    assert not page.open
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form", "link", "base"})
    for content in files_of(data).values():
        assert b"<script" not in content or b"</svg>" not in content
