"""How often does a pack's model refuse, with and without its base adapter, by source of the prompts?

    python refusals.py data/ --pack PACK --out refusals.json

It asks the first prompts of each source in harmful.jsonl and all of harmless.jsonl. None of them was trained on. The
model answers greedily in float32, and phrases in the openings of the answers mark refusals.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from sqsd_filter.judges import is_refusal
from sqsd_filter.judges.generation import answer
from sqsd_filter.scoring.models import load_model, load_tokenizer
from sqsd_filter.scoring.pack import load_pack
from sqsd_filter.statistics import wilson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder with prepare.py's files")
    parser.add_argument("--pack", required=True)
    parser.add_argument("--per-source", type=int, default=40, help="harmful prompts per source")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    options = parser.parse_args()
    pack = load_pack(options.pack)
    prompts = {
        f"{name}: {source}": asked if name == "harmless" else asked[: options.per_source]
        for name in ("harmful", "harmless")
        for source, asked in by_source(options.data / f"{name}.jsonl").items()
    }
    tokenizer = load_tokenizer(pack.base_model, pack.base_revision)
    result: dict[str, Any] = {"pack": pack.name, "fingerprint": pack.fingerprint, "refusals": {}}
    for model_name, adapter in (("without base adapter", None), ("with base adapter", pack.base_folder)):
        model = load_model(pack.base_model, pack.base_revision, dtype=torch.float32, adapter=adapter)
        for name, asked in prompts.items():
            answers = answer(model, tokenizer, asked, max_new_tokens=options.max_new_tokens)
            refused = sum(map(is_refusal, answers))
            low, high = wilson(refused, len(answers))
            print(f"{model_name}, {name}: {refused} of {len(answers)} [{low:.2f}, {high:.2f}]", flush=True)
            entry = {"refused": refused, "of": len(answers), "low": round(low, 4), "high": round(high, 4)}
            result["refusals"].setdefault(model_name, {})[name] = entry
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def by_source(path: Path) -> dict[str, list[str]]:
    prompts: dict[str, list[str]] = defaultdict(list)
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            prompts[row["source"]].append(row["prompt"])
    return prompts


if __name__ == "__main__":
    main()
