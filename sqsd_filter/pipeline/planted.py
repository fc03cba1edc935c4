"""How many of the dropped rows are false alarms, and how many unsafe rows of the known kind remain: a mixture estimate.

A corpus of n rows is taken for a mixture: a share π is like the known unsafe answers, the rest like the benign
reference. Of the benign rows a share b is above the threshold, of the unsafe ones u, of the corpus s. Then

    s = (1 - π) b + π u        π = (s - b) / (u - b), within [0, 1]

Of the rows above the threshold (1 - π) b / s are false alarms, and of the others π (1 - u) / (1 - s) are unsafe.

The 95 % intervals have the sampling error of b, u and s: each is drawn from its Beta posterior (Jeffreys' prior), and
the two counts from the binomials of each draw. A clean corpus gets intervals that include 0 unsafe rows, since every
draw with s < b is one of π = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sqsd_filter.pipeline.report import Interval, PlantedFigures

DRAWS = 20_000


@dataclass(frozen=True)
class Above:
    """How many of so many rows are above a threshold."""

    above: int
    rows: int

    @property
    def share(self) -> float:
        return self.above / self.rows

    def draw(self, rng: np.random.Generator, draws: int) -> np.ndarray:
        """Shares (draws,) from the posterior."""
        return rng.beta(self.above + 0.5, self.rows - self.above + 0.5, draws)


def estimate(corpus: Above, benign: Above, unsafe: Above, draws: int = DRAWS) -> PlantedFigures | None:
    """The estimates with their intervals, the same for the same counts; None where the known unsafe answers are not
    above the threshold more often than the benign rows, so that nothing can be told."""
    s, b, u = corpus.share, benign.share, unsafe.share
    if u <= b:
        return None
    rng = np.random.default_rng(0)
    s_d, b_d, u_d = (each.draw(rng, draws) for each in (corpus, benign, unsafe))
    π_d = np.where(u_d > b_d, _planted(s_d, b_d, u_d), rng.random(draws))
    false_d = rng.binomial(corpus.above, _false(π_d, b_d, u_d))
    left_d = rng.binomial(corpus.rows - corpus.above, _left(π_d, b_d, u_d))
    π = _planted(np.array(s), np.array(b), np.array(u))
    return {
        "benign_above": b,
        "unsafe_above": u,
        "share": _interval(float(π), π_d),
        "false_alarms": _interval(corpus.above * float(_false(π, np.array(b), np.array(u))), false_d),
        "remaining": _interval((corpus.rows - corpus.above) * float(_left(π, np.array(b), np.array(u))), left_d),
    }


def _planted(s: np.ndarray, b: np.ndarray, u: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        share: np.ndarray = np.clip((s - b) / (u - b), 0.0, 1.0)
    return share


def _false(π: np.ndarray, b: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The share of false alarms among the rows above."""
    return _part((1 - π) * b, π * u)


def _left(π: np.ndarray, b: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The share of unsafe rows among the rows below."""
    return _part(π * (1 - u), (1 - π) * (1 - b))


def _part(part: np.ndarray, rest: np.ndarray) -> np.ndarray:
    whole = part + rest
    share: np.ndarray = np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)
    return share


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    return {"estimate": value, "low": min(low, value), "high": max(high, value)}
