"""Score columns of strangers: whatever they hold, it is a score, no score, or one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter import Cut, select_dataset
from sqsd_filter.errors import InputError
from tests.corpora import make_rows, write_jsonl


def test_a_risk_that_is_no_finite_number_is_no_score(tmp_path: Path) -> None:
    risks = [1.5, 2, 10**400, float("nan"), float("inf")]
    rows = [{**row, "sqsd_risk": risk, "sqsd_status": "scored"} for row, risk in zip(make_rows(5), risks, strict=True)]
    odd = {**make_rows(1)[0], "sqsd_risk": "much", "sqsd_status": "mine"}
    path = write_jsonl(tmp_path / "in.jsonl", [*rows, odd])
    report = select_dataset(str(path), tmp_path / "out", Cut.of(drop_count=1))
    assert report["rows"]["kept"] == 1
    assert report["unscored"] == {"nonfinite": 3, "mine": 1}


def test_more_statuses_than_codes_are_refused(tmp_path: Path) -> None:
    rows = [{**row, "sqsd_risk": None, "sqsd_status": f"status {row['id']}"} for row in make_rows(300)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(InputError, match=r"in\.jsonl has over 255 values of sqsd_status \(line 255\)"):
        select_dataset(str(path), tmp_path / "out", Cut.of(drop_count=1))
