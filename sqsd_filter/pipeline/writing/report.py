"""What a run says of itself: report.json, and the dataset card that makes the output a dataset anyone can load."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.pipeline.folder import write_whole
from sqsd_filter.pipeline.reading.json_schema import json_columns
from sqsd_filter.pipeline.scores.scored import Scored
from sqsd_filter.pipeline.selection import FORMULA, Cut, Selection
from sqsd_filter.pipeline.writing.export import SPLITS, data_file, kept_schema

QUANTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


def versions() -> dict[str, str]:
    """Versions of everything that can change a score or a byte."""
    names = ("sqsd-filter", "torch", "transformers", "datasets", "pyarrow", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def summarise(scored: Scored, selection: Selection | None, cut: Cut | None) -> dict[str, Any]:
    """The figures of a finished run: rows by fate, why rows have no score, the cut, and how risk is spread."""
    risk = scored.risk[scored.scored]
    quantiles = np.quantile(risk, [q / 100 for q in QUANTILES]) if len(risk) else []
    rows: dict[str, int] = {"total": scored.corpus.n_rows}
    if selection is not None:
        rows |= {split: selection.count(place) for split, place in SPLITS.items()}
    else:
        rows |= {"errors": int((~scored.scored).sum())}
    found = {
        "rows": rows | scored.counts,
        "unscored": scored.reasons(),
        "format": str(scored.form) if scored.form else None,
        "json_columns": json_columns(kept_schema(scored, selection)),
        "cut": str(cut) if cut else None,
        "threshold": selection.threshold if selection else None,
        "ties": selection.ties if selection else 0,
        "tokens": int(scored.tokens.sum()),
        "risk_quantiles": {f"{q}%": float(v) for q, v in zip(QUANTILES, quantiles, strict=False)},
        "inputs": scored.corpus.inputs,
    }
    if selection is not None and cut is not None:
        found |= _pieces(selection, cut)
    return found


def _pieces(selection: Selection, cut: Cut) -> dict[str, Any]:
    """The figures of groups and splits where they were cut apart, and of weights where there are any."""
    found: dict[str, Any] = {}
    figures: list[dict[str, Any]] = [
        {**piece.key, "scored": piece.scored, "dropped": piece.dropped, "threshold": piece.threshold}
        | ({"scale": piece.scale, "sum": piece.total} if cut.weights else {})
        for piece in selection.pieces
    ]
    apart = cut.per_group is not None or cut.per_split
    if apart:
        found["groups"] = {"column": cut.per_group, "spared": selection.spared, "groups": figures}
    if cut.weights:
        level = {name: None if apart else figures[0][name] for name in ("threshold", "scale")}
        found["weights"] = {"formula": FORMULA, **level, "sum": sum(piece.total for piece in selection.pieces)}
    return found


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda sink: sink.write((json.dumps(report, indent=2) + "\n").encode()))


def write_card(path: Path, report: Mapping[str, Any]) -> None:
    """The dataset card: configs for kept (the default), dropped and errors, and what was done in words.

    The data files must be there.
    """
    rows = report["rows"]
    pack = report.get("pack")
    header = ["---", "configs:"]
    for split in SPLITS:
        header += [f"- config_name: {'default' if split == 'kept' else split}", "  data_files:", "  - split: train"]
        header += [f"    path: data/{data_file(split)}"]
        # datasets caches what it loaded by the folder's last name and this header alone: two runs' must differ
        with (path.parent / "data" / data_file(split)).open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        header += [f"  description: {rows[split]} rows, BLAKE2b {content}"]
    header += ["tags:", "- sqsd-filter", "- safety", "---"]
    measured = (
        f"It was measured with the pack `{pack['name']}` ({pack['fingerprint']}) on `{pack['base_model']}`."
        if pack
        else "The scores were already in the input."
    )
    if report["threshold"] is None:
        threshold = "No row was dropped."
    else:
        threshold = f"The lowest risk among the dropped rows is {report['threshold']:.6g}"
        threshold += f"; {report['ties']} kept rows have that very risk." if report["ties"] else "."
    load = {"kept": "load_dataset(path)", **{s: f'load_dataset(path, "{s}")' for s in ("dropped", "errors")}}
    # datasets raises for a split without rows, unless it is streamed
    load = {split: call if rows[split] else f"{call[:-1]}, streaming=True)" for split, call in load.items()}
    unscored = ", ".join(f"{count} {status}" for status, count in report["unscored"].items())
    stored = ", ".join(f"`{name}`" for name in report["json_columns"])
    as_json = f"\nNo one type holds all values of {stored}, so they are stored as JSON. `load_dataset` decodes\n"
    as_json += "what it can; where it gives text, `json.loads` gives the value.\n"
    body = f"""
# {rows["kept"]} of {rows["total"]} rows, the riskiest removed

Each row was given an SQSD risk (arXiv 2605.04572): how much more the parameter update that the row alone would cause
points along a danger direction than along a safety direction. {measured}
Rows were cut by `{report["cut"]}`. {threshold}

| | rows | load with |
| --- | ---: | --- |
| kept | {rows["kept"]} | `{load["kept"]}` |
| dropped | {rows["dropped"]} | `{load["dropped"]}` |
| errors, not scored{f" ({unscored})" if unscored else ""} | {rows["errors"]} | `{load["errors"]}` |
| total | {rows["total"]} | |

Columns added: `sqsd_risk` (higher is riskier), one `sqsd_<probe>` for each projection, and `sqsd_status`. The other
columns are the input's. `sqsd/report.json` holds the settings, inputs and versions of the run.
{as_json if stored else ""}
A low risk is no promise: it says that a row pushes little along the directions of this pack, not that a model
fine-tuned on the kept rows is safe. Evaluate the model that you train.
"""
    write_whole(path, lambda sink: sink.write(("\n".join(header) + "\n" + body).encode()))
