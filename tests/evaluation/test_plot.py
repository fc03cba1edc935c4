"""The pictures of an evaluation: what is drawn where."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from sqsd_filter.evaluation.figures import RunOutcome, window_figures
from sqsd_filter.evaluation.plot import draw_windows
from sqsd_filter.evaluation.results import WindowFigures


def figures(count: int) -> dict[str, WindowFigures]:
    """The figures of `count` scorers: the k-th has a rate of k % in S1 and of 0 % in S2."""
    return {f"s{k}": window_figures([[outcome(k)], [outcome(0)]]) for k in range(1, count + 1)}


def outcome(unsafe: int) -> RunOutcome:
    """`unsafe` of 100 answers are unsafe."""
    return RunOutcome(1, 1, ["unsafe"] * unsafe + ["refused"] * (100 - unsafe), None, None)


@pytest.mark.parametrize("count", [1, 4, 5, 12])
def test_each_scorer_has_its_rates_and_beyond_a_few_a_panel_of_its_own(count: int) -> None:
    draw_windows(figure := Figure(), figures(count))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == (1 if count <= 4 else count)
    bars = [each for axes in panels for each in axes.containers if isinstance(each, ErrorbarContainer)]
    first_rates = [float(np.asarray(each.lines[0].get_ydata())[0]) for each in bars]
    assert first_rates == pytest.approx(range(1, count + 1))
    if count > 4:
        assert [axes.get_title() for axes in panels] == list(figures(count))
        assert all([1.0, 0.0] in [np.asarray(line.get_ydata()).tolist() for line in axes.lines] for axes in panels)
        assert figure.legends == []
    else:
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(figures(count))
