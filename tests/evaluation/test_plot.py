"""The pictures of an evaluation: what is drawn where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sqsd_filter.evaluation.plot import draw_windows


def figures(count: int) -> dict[str, Any]:
    """Those of so many scorers, the k-th of which has a rate of k % at S1."""
    return {f"s{k}": {"asr": [k / 100, 0.0], "ci": [[0.0, 0.5], [0.0, 0.1]]} for k in range(1, count + 1)}


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_each_scorer_has_its_rates_and_beyond_a_few_a_panel_of_its_own(count: int) -> None:
    draw_windows(figure := Figure(), figures(count))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == (1 if count <= 4 else count)
    drawn = [float(np.asarray(bars.lines[0].get_ydata())[0]) for axes in panels for bars in axes.containers]
    assert drawn == pytest.approx(range(1, count + 1))
    if count > 4:
        assert [axes.get_title() for axes in panels] == list(figures(count))
        assert all([1.0, 0.0] in [list(line.get_ydata()) for line in axes.lines] for axes in panels)
        assert figure.legends == []
    else:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(figures(count))
