"""The choice of an engine: this process or Ray, by what the user asks for and what there is."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from sqsd_filter.errors import SQSDError, UsageError
from sqsd_filter.pipeline.stage.choice import choose_engine
from sqsd_filter.pipeline.stage.engines import LocalEngine
from sqsd_filter.pipeline.stage.ray_engine import RayEngine
from sqsd_filter.scoring.scorer import SQSDScorer


def test_auto_stays_in_this_process_until_ray_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert isinstance(choose_engine(), LocalEngine)
    assert isinstance(choose_engine(replicas=1), LocalEngine)
    assert isinstance(choose_engine(replicas=2), RayEngine)
    assert isinstance(choose_engine("ray"), RayEngine)
    assert isinstance(choose_engine(gpus_per_replica=0.5), RayEngine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert isinstance(choose_engine(), RayEngine)
    assert isinstance(choose_engine(device="cuda:1"), LocalEngine)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert choose_engine().address == "head:6379"  # type: ignore[attr-defined]
    assert choose_engine(ray_address="other:1").address == "other:1"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"engine": "slurm"}, "one of auto, local, ray"),
        ({"replicas": 0}, "at least 1"),
        ({"gpus_per_replica": 1.5}, "whole number"),
        ({"gpus_per_replica": -1}, "whole number"),
        ({"engine": "local", "replicas": 2}, "--engine ray"),
    ],
    ids=lambda value: str(value),
)
def test_senseless_engines_are_usage_errors(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=re.escape(complaint)):
        choose_engine(**asked)


def test_an_address_where_nobody_answers_is_one_sentence_at_once(
    tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # a session that is open would be used instead
    began = time.monotonic()
    with pytest.raises(SQSDError, match=r"No Ray cluster answers at 127\.0\.0\.1:9 .*--ray-address"):
        RayEngine(address="127.0.0.1:9").prepare(SQSDScorer(tiny_pack))
    assert time.monotonic() - began < 10
