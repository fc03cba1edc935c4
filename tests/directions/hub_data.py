"""Miniatures of the datasets that recipes name: their files, columns and cards, with harmless rows."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable
from typing import Any

from tests.hub import Hub

BEAVERTAILS = "PKU-Alignment/BeaverTails"
SAFERLHF = "PKU-Alignment/PKU-SafeRLHF-10K"
DOLLY = "databricks/databricks-dolly-15k"
AEGIS = "nvidia/Aegis-AI-Content-Safety-Dataset-2.0"


def lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(licence: str, **splits: str) -> bytes:
    files = "".join(f"\n  - split: {split}\n    path: {path}" for split, path in splits.items())
    configs = f"configs:\n- config_name: default\n  data_files:{files}\n" if files else ""
    return f"---\nlicense: {licence}\n{configs}---\n\n# A dataset\n".encode()


def beavertails(n: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {k}?", "response": f"Answer {k}.", "category": {"a": k % 3 == 0}, "is_safe": k % 2 == 0}
        for k in range(n)
    ]


def saferlhf(n: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {k}?",
            "response_0": f"No {k}.",
            "response_1": f"Yes {k}.",
            "is_response_0_safe": True,
            "is_response_1_safe": k % 2 == 0,
            "better_response_id": k % 2,
            "safer_response_id": k % 3 % 2,
        }
        for k in range(n)
    ]


def dolly(n: int) -> list[dict[str, Any]]:
    return [
        {
            "instruction": f"Instruction {k}.",
            "context": f"Context {k}." if k % 2 else "",
            "response": f"Response {k}.",
            "category": "open_qa",
        }
        for k in range(n)
    ]


def aegis(n: int) -> list[dict[str, Any]]:
    """Some rows are prompts without an answer, and some prompts are withheld."""
    return [
        {
            "id": str(k),
            "reconstruction_id_if_redacted": k if k % 5 == 0 else None,
            "prompt": "REDACTED" if k % 5 == 0 else f"Question {k}?",
            "response": None if k % 3 == 0 else f"Answer {k}.",
            "prompt_label": "safe",
            "response_label": None if k % 3 == 0 else ("safe", "unsafe")[k % 2],
            "violated_categories": "",
            "prompt_label_source": "human",
            "response_label_source": None,
        }
        for k in range(n)
    ]


def serve(hub: Hub, n: int = 24) -> dict[str, str]:
    """Put all of them on the Hub. Returns the commit of each."""
    packed = {split: lzma.compress(lines(beavertails(n))) for split in ("330k", "30k")}
    path = "round0/{}/train.jsonl.xz".format
    return {
        BEAVERTAILS: hub.add(
            BEAVERTAILS,
            {
                "README.md": card("cc-by-nc-4.0", **{f"{split}_train": path(split) for split in packed}),
                **{path(split): data for split, data in packed.items()},
            },
        ),
        SAFERLHF: hub.add(
            SAFERLHF,
            {"README.md": card("cc-by-nc-4.0"), "round0/train.jsonl.xz": lzma.compress(lines(saferlhf(n)))},
        ),
        DOLLY: hub.add(DOLLY, {"README.md": card("cc-by-sa-3.0"), "databricks-dolly-15k.jsonl": lines(dolly(n))}),
        AEGIS: hub.add(AEGIS, {"README.md": card("cc-by-4.0"), "train.json": lines(aegis(n))}),
    }
