"""Stages, bad inputs and lineage in the report."""

import dataclasses

from functa.tasks.report.blocks import ReportData
from functa.tasks.report.sections.provenance import lineage_table
from tests.helpers.tasks.report_page import page_of


def test_many_bad_inputs_are_counted_and_some_named(full: ReportData) -> None:
    bad = [{"key": f"bad-{n}", "reason": "unreadable"} for n in range(1234)]
    text = page_of(dataclasses.replace(full, bad_inputs=bad))
    assert "1,234 images were left out; the first 200 are named" in text and "bad-199" in text and "bad-200" not in text


def test_lineage_rows_have_equal_columns() -> None:
    rows = lineage_table([{"digest": "b", "what": "field", "extra": {"a": 1}}, {"what": "x", "made_from": ["b", "c"]}])
    assert [list(row) for row in rows] == [["what", "digest", "made_from", "extra"]] * 2
    assert rows[1] == {"what": "x", "digest": "", "made_from": "b, c", "extra": ""}
