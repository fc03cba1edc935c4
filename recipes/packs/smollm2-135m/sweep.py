"""Unsafe answers against benign rows: the AUC of many (direction, state, scaling) combinations, in one pass per state.

    python sweep.py data/val.jsonl --direction danger-48=RUN/.build/danger/checkpoint-48 --direction safety=RUN/safety \
        --state initial=RUN/initial --state safety=RUN/safety@1.0 --fresh initial
    python sweep.py data/test.jsonl --pack PACK --last RUN/.build/initial/checkpoint-37 --out results.json

The first form lists every direction at every state, then the best differences of two. The second judges one pack.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sqsd_filter.directions.states import FRESH, fresh_state, over_links
from sqsd_filter.scoring.chat_encoder import Encoded, cut_answer
from sqsd_filter.scoring.pack import Pack, Probe, load_pack
from sqsd_filter.scoring.projection import cosines
from sqsd_filter.scoring.scorer import SQSDScorer
from sqsd_filter.statistics import auc

POSITIVE = "unsafe"
LAST, SHARED = "last", "shared"


@dataclass(frozen=True)
class Measured:
    """Scores of n rows: each probe's sum of cosines and, for comparison, its projection without normalisation."""

    groups: np.ndarray
    tokens: np.ndarray  # answer tokens scored
    normalised: Mapping[str, np.ndarray]
    unnormalised: Mapping[str, np.ndarray]
    modules: Mapping[str, np.ndarray]  # probe -> (n, m) cosines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="val.jsonl or test.jsonl from prepare.py")
    parser.add_argument("--pack", type=Path, help="judge this pack, with its own probes")
    parser.add_argument("--last", type=Path, metavar="FOLDER", help="and at the last checkpoint of its benign run")
    parser.add_argument("--direction", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--state", action="append", default=[], metavar="NAME=FOLDER[@SCALING]")
    parser.add_argument("--fresh", metavar="STATE", help="also a state with B = 0 and this state's A")
    parser.add_argument("--base-model", default="smollm2-135m-instruct")
    parser.add_argument("--base-adapter", type=Path, metavar="FOLDER", help="merged into the base model first")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--answer-tokens", type=int, help="cut all answers to this length, leave out shorter ones")
    parser.add_argument("--per-group", type=int, help="rows per group")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap draws for an interval")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--save", type=Path, help="the scores and the cosines of every module, as .npz")
    parser.add_argument("--out", type=Path, help="write the AUCs there as JSON")
    options = parser.parse_args()
    with options.rows.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if options.per_group:
        rows = [row for row in rows if int(row["id"].rsplit("-", 1)[1]) < options.per_group]

    with tempfile.TemporaryDirectory() as folder:
        given = load_pack(options.pack) if options.pack else None
        pack = _with_others(given, options.last, Path(folder)) if given else _grid(options, Path(folder))
        measured = measure(
            SQSDScorer(pack, dtype=options.dtype, max_length=options.max_length), rows, options.answer_tokens
        )
    if options.save:
        arrays: dict[str, Any] = {"groups": measured.groups, "tokens": measured.tokens}
        arrays |= {f"sum:{k}": v for k, v in measured.normalised.items()}
        arrays |= {f"raw:{k}": v for k, v in measured.unnormalised.items()}
        arrays |= {f"mod:{k}": v.astype(np.float32) for k, v in measured.modules.items()}
        np.savez_compressed(options.save, **arrays)
    if given:
        table = {
            name: intervals(score, measured.groups, options.draws) for name, score in variants(given, measured).items()
        }
        for name, entry in table.items():
            print(f"{name:28s}", *(f"{g} {e['auc']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for g, e in entry.items()))
        if options.out:
            names, counts = np.unique(measured.groups, return_counts=True)
            result = {
                "rows": options.rows.name,
                "counts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
                "settings": {
                    "dtype": options.dtype,
                    "max_length": options.max_length,
                    "answer_tokens": options.answer_tokens,
                },
                "pack": {
                    "name": given.name,
                    "fingerprint": given.fingerprint,
                    "probes": [asdict(p) for p in given.probes],
                },
                "auc_of_unsafe_against": table,
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    else:
        grid = _grid_table(measured)
        for name, aucs in grid.items():
            print(f"{name:60s}", *(f"{g} {value:.3f}" for g, value in aucs.items()))
        if options.out:
            result = {
                "rows": options.rows.name,
                "settings": {"dtype": options.dtype, "max_length": options.max_length},
                "auc_of_unsafe_against": {n: {g: round(v, 4) for g, v in aucs.items()} for n, aucs in grid.items()},
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measure(scorer: SQSDScorer, rows: Sequence[Mapping[str, Any]], answer_tokens: int | None = None) -> Measured:
    """Score rows one by one. Rows that can't be scored are left out, and their number is printed.

    `answer_tokens` makes all answers equally long, as a control: unsafe answers tend to be longer.
    """
    rows_encoded = scorer.encoder.encode(
        [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in rows]
    )
    encoded = {k: cut_answer(e, answer_tokens) for k, e in enumerate(rows_encoded) if isinstance(e, Encoded)}
    usable = [k for k, e in encoded.items() if int(e.answer.sum()) >= (answer_tokens or 1)]
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} rows have too short an answer within {scorer.max_length} tokens: left out")
    names = [p.name for p in scorer.pack.probes]
    cosines: list[torch.Tensor] = []
    projections: list[torch.Tensor] = []
    for done, k in enumerate(usable, 1):
        cosine, projection = _both(scorer, encoded[k])
        cosines.append(cosine)
        projections.append(projection)
        if done % 50 == 0:
            print(f"{done} of {len(usable)} rows", flush=True)
    modules_npm = torch.stack(cosines).double().numpy()
    raw_np = torch.stack(projections).double().numpy()
    return Measured(
        groups=np.array([rows[k]["group"] for k in usable]),
        tokens=np.array([int(encoded[k].answer.sum()) for k in usable]),
        normalised={name: modules_npm[:, p].sum(-1) for p, name in enumerate(names)},
        unnormalised={name: raw_np[:, p] for p, name in enumerate(names)},
        modules={name: modules_npm[:, p] for p, name in enumerate(names)},
    )


def _both(scorer: SQSDScorer, row: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's cosines (p, m), and (p,) the ablation: <ΔW, V> summed over modules as it is, with the mean loss."""
    model = scorer.model
    modules: dict[int, torch.Tensor] = {}
    raw_p = torch.zeros(len(model.probes))
    for at in model.run_passes([row]):
        dots_bpm, norms2_bm, norm_pm = model.capture.products()
        raw_p[model.members[at]] = dots_bpm[0].sum(-1) / int(row.answer.sum())
        modules |= zip(model.members[at], cosines(dots_bpm, norms2_bm, norm_pm)[0], strict=True)
    return torch.stack([modules[k] for k in range(len(model.probes))]), raw_p


# ------------------------------------------------------------------------------------------------ combinations


def _grid(options: argparse.Namespace, folder: Path) -> Pack:
    """A pack of links to the adapters, with a probe for every direction at every state."""
    directions = dict(entry.split("=", 1) for entry in options.direction)
    folders = {name: Path(folder) for name, folder in directions.items()}
    states: list[tuple[str, float | None]] = []
    for entry in options.state:
        name, _, rest = entry.partition("=")
        where, _, scaling = rest.partition("@")
        folders[name] = Path(where)
        states.append((name, float(scaling) if scaling else None))
    if options.fresh:
        folders[FRESH] = fresh_state(folders[options.fresh], folder / f".{FRESH}")
        states.append((FRESH, None))
    probes = [
        Probe(f"{direction}|{state if scaling is None else f'{state}@{scaling:g}'}", 1.0, direction, state, scaling)
        for state, scaling in states
        for direction in directions
    ]
    base = {"base adapter": options.base_adapter} if options.base_adapter else {}
    pack = Pack(folder, "sweep", options.base_model, (), base_adapter=next(iter(base), None))
    return over_links(pack, probes, folder, folders | base)


def _with_others(pack: Pack, last: Path | None, folder: Path) -> Pack:
    """The pack with further probes. The benign state is the first probe's.

    All probes are added at the benign state. Those of the benign state are added at a fresh LoRA with B = 0 and at the
    last checkpoint."""
    benign = pack.probes[0].at
    folders = {FRESH: fresh_state(pack.adapter(benign[0]), folder / f".{FRESH}"), **({LAST: last} if last else {})}
    probes = [*pack.probes, *(replace(p, name=f"{SHARED}_{p.name}") for p in pack.at_one_state(benign[0]).probes)]
    for state in folders:
        moved = (p for p in pack.probes if p.at == benign)
        probes += [replace(p, name=f"{state}_{p.name}", state=state, state_scaling=None) for p in moved]
    return over_links(pack, probes, folder, folders)


def variants(pack: Pack, measured: Measured) -> dict[str, np.ndarray]:
    """The risk of a pack that `_with_others` measured, its parts and its ablations, each as scores (n,)."""

    def risk(scores: Mapping[str, np.ndarray], at: str = "") -> np.ndarray:
        """The risk with the probes that were measured at `at` taken there, and the others at their own state."""
        weighted = [p.weight * scores.get(f"{at}_{p.name}", scores[p.name]) for p in pack.probes]
        total: np.ndarray = np.sum(weighted, axis=0)
        return total

    scores = {"risk": risk(measured.normalised), "risk at a fresh state (B = 0)": risk(measured.normalised, FRESH)}
    if any(name.startswith(f"{LAST}_") for name in measured.normalised):
        scores["risk at the last checkpoint"] = risk(measured.normalised, LAST)
    scores[f"risk, shared state ({pack.probes[0].state})"] = risk(measured.normalised, SHARED)
    for p in pack.probes:
        scores[f"{p.name} only"] = np.sign(p.weight) * measured.normalised[p.name]
    scores["risk, not normalised"] = risk(measured.unnormalised)
    scores["answer length"] = measured.tokens.astype(float)
    return scores


# ------------------------------------------------------------------------------------------------ AUC


def against(score: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """AUC of the unsafe rows against every other group."""
    others = [g for g in dict.fromkeys(groups.tolist()) if g != POSITIVE]
    return {g: auc(score[groups == POSITIVE], score[groups == g]) for g in others}


def intervals(score: np.ndarray, groups: np.ndarray, draws: int = 1000, seed: int = 0) -> dict[str, dict[str, float]]:
    """`against` with bootstrap 95 % intervals over rows."""
    random = np.random.default_rng(seed)
    aucs = {}
    for group, value in against(score, groups).items():
        positive, negative = score[groups == POSITIVE], score[groups == group]
        drawn = [
            auc(random.choice(positive, len(positive)), random.choice(negative, len(negative))) for _ in range(draws)
        ]
        low, high = np.percentile(drawn, [2.5, 97.5])
        aucs[group] = {"auc": round(value, 4), "low": round(float(low), 4), "high": round(float(high), 4)}
    return aucs


def _grid_table(measured: Measured, best: int = 25) -> dict[str, dict[str, float]]:
    """AUCs of the answer's length, of every direction at every state, and of the best differences of two."""
    groups = measured.groups
    print("n", {g: int((groups == g).sum()) for g in dict.fromkeys(groups.tolist())})
    table = {"answer length": against(measured.tokens.astype(float), groups)}
    for name, score in measured.normalised.items():
        table[name] = against(score, groups)
        table[f"{name}, not normalised"] = against(measured.unnormalised[name], groups)
    pairs = {
        f"{plus} - {minus}": against(a - b, groups)
        for plus, a in measured.normalised.items()
        for minus, b in measured.normalised.items()
        if plus.startswith("danger") and minus.startswith("safety")
    }
    by_benign = sorted(pairs, key=lambda name: -min(pairs[name][g] for g in ("dolly", "gsm8k")))
    return table | {name: pairs[name] for name in by_benign[:best]}


if __name__ == "__main__":
    main()
