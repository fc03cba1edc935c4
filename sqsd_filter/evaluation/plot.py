"""The picture of an evaluation: the attack success rate by window, a line a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sqsd_filter.pictures import BLUE, ORANGE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # told apart with any colour vision
MARKERS = "osD^vP"  # which come round at another time than the colours
WIDTH = 0.4  # of a window's place, over which the scorers' points are spread


def draw(figure: Figure, scorers: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw the `scorers` of results.json: rates in % with their intervals."""
    axes = figure.add_subplot()
    aside = np.linspace(-WIDTH / 2, WIDTH / 2, len(scorers)) if len(scorers) > 1 else [0.0]
    for k, (name, found) in enumerate(scorers.items()):
        rates, bounds = 100 * np.array(found["asr"]), 100 * np.array(found["ci"])
        beyond = np.clip([rates - bounds[:, 0], bounds[:, 1] - rates], 0, None)
        axes.errorbar(
            np.arange(1, len(rates) + 1) + aside[k],
            rates,
            beyond,
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            linestyle="--" if k >= len(COLOURS) else "-",
            linewidth=1.2,
            elinewidth=1,
            capsize=2,
            label=name,
        )
    count = max(len(found["asr"]) for found in scorers.values())
    axes.set_xticks(range(1, count + 1), [f"S{k}" for k in range(1, count + 1)])
    axes.set_xlabel("window of rows, from the riskiest (S1) to the safest", fontsize=13)
    axes.set_ylabel("attack success rate (%; 95 % intervals)", fontsize=12)
    axes.set_ylim(-2, 102)
    axes.tick_params(labelsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5, fontsize=12, frameon=False)
