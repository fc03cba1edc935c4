"""The figures of a finished run for its report: rows by fate, the cut, and how risk is spread."""

from __future__ import annotations

import numpy as np

from sqsd_filter.pipeline.meaning import Meaning
from sqsd_filter.pipeline.report import (
    Fates,
    GroupFigures,
    PieceFigures,
    PieceWeights,
    RowCounts,
    RowWeights,
    RunFigures,
)
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selecting.selection import DROPPED, ERROR, FORMULA, KEPT, Cut, Piece, Selection

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def summarise(
    scored: Scored, selection: Selection | None, cut: Cut | None, meaning: Meaning | None = None
) -> RunFigures:
    """Without a selection no row is dropped; `meaning` has the reference to compare risks with."""
    figures: RunFigures = {
        "rows": _counts(scored, selection),
        "unscored": scored.reasons(),
        "format": str(scored.form) if scored.form else None,
        "cut": str(cut) if cut else None,
        "threshold": selection.threshold if selection else None,
        "ties": selection.ties if selection else 0,
        "tokens": int(scored.tokens.sum()),
        "risk_quantiles": _quantiles(scored.risk[scored.scored]),
        "inputs": scored.corpus.inputs,
    }
    if scored.modules:
        figures["modules"] = {name: list(each.names) for name, each in scored.modules.items()}
    if selection is not None and cut is not None:
        apart = cut.per_group is not None or cut.per_split
        pieces = [_piece(piece, cut) for piece in selection.pieces]
        if apart:
            figures["groups"] = GroupFigures(column=cut.per_group, spared=selection.spared, groups=pieces)
        if cut.weights:
            figures["weights"] = RowWeights(
                formula=FORMULA,
                threshold=None if apart else pieces[0]["threshold"],
                scale=None if apart else pieces[0]["scale"],
                sum=sum(piece.total for piece in selection.pieces),
            )
    if meaning is not None and (reference := meaning.figures(scored, selection, cut)) is not None:
        figures["reference"] = reference
    return figures


def _counts(scored: Scored, selection: Selection | None) -> RowCounts:
    """Total and fates first, as they stand in the file."""
    total, origins = scored.corpus.n_rows, scored.counts
    if selection is None:
        return {"total": total, "errors": int((~scored.scored).sum()), **Fates(), **origins}
    kept, dropped, errors = (selection.count(fate) for fate in (KEPT, DROPPED, ERROR))
    return {"total": total, "kept": kept, "dropped": dropped, "errors": errors, **origins}


def _quantiles(risk: np.ndarray) -> dict[str, float]:
    if not len(risk):
        return {}
    values = np.quantile(risk, [q / 100 for q in QUANTILES]).tolist()
    return {f"{q}%": value for q, value in zip(QUANTILES, values, strict=True)}


def _piece(piece: Piece, cut: Cut) -> PieceFigures:
    return {
        **piece.key,
        "scored": piece.scored,
        "dropped": piece.dropped,
        "threshold": piece.threshold,
        **(PieceWeights(scale=piece.scale, sum=piece.total) if cut.weights else PieceWeights()),
    }
