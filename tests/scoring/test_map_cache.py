"""The cache of `datasets` sees the content of a scorer: the same one is not run again, and another one is."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher

from sqsd_filter import Columns, SQSDScorer
from tests.scoring.map_rows import rows, run_script
from tests.tiny import CONVERSATIONS


@pytest.fixture
def stored(tmp_path: Path) -> Dataset:
    """Rows on disk: others are not cached."""
    rows().save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


def test_the_same_map_again_is_taken_from_the_cache(
    stored: Dataset, tiny_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored.map(SQSDScorer(tiny_pack), batched=True)
    shutil.copytree(tiny_pack, tmp_path / "elsewhere")
    monkeypatch.setattr(SQSDScorer, "score", None)  # the model is not asked again
    again = stored.map(SQSDScorer(tmp_path / "elsewhere", device="cpu"), batched=True)
    assert again.cache_files == first.cache_files != stored.cache_files
    with pytest.raises(TypeError):
        stored.map(SQSDScorer(tiny_pack, max_length=100), batched=True)


def test_a_hash_is_the_same_for_the_same_content(tiny_pack: Path, tmp_path: Path) -> None:
    scorer = SQSDScorer(tiny_pack)
    new = Hasher.hash(scorer)
    scorer({"messages": CONVERSATIONS[:2]}, 0)
    shutil.copytree(tiny_pack, tmp_path / "copy")
    same = [
        scorer,
        scorer.on_device("cpu", gpus=0.5),
        pickle.loads(pickle.dumps(scorer)),
        SQSDScorer(tmp_path / "copy"),
        SQSDScorer(str(tiny_pack), device="cpu", dtype="float32", max_length=256, columns=Columns()),
        SQSDScorer(tiny_pack, token_budget=100, trust_remote_code=True),
    ]
    assert {Hasher.hash(other) for other in same} == {new}


def test_a_hash_is_the_same_in_another_process(tiny_pack: Path) -> None:
    code = (
        "import sys; from sqsd_filter import SQSDScorer; scorer = SQSDScorer(sys.argv[1])\n"
        "from datasets.fingerprint import Hasher; print(Hasher.hash(scorer))"  # imported after the scorer was made
    )
    assert run_script("-c", code, str(tiny_pack), PYTHONHASHSEED="7").split() == [Hasher.hash(SQSDScorer(tiny_pack))]


def changed(folder: Path, file: str) -> None:
    """One bit of a file's last byte."""
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)


def test_a_hash_is_another_for_another_content(packs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(packs["llama"], pack := tmp_path / "pack")
    (pack / "pack.json").write_text((pack / "pack.json").read_text().replace(str(packs["llama"]), str(pack)))

    def hashes() -> Iterator[str]:
        yield Hasher.hash(SQSDScorer(pack))
        changed(pack, "danger/adapter_model.safetensors")
        yield Hasher.hash(SQSDScorer(pack))
        changed(pack, "base/model.safetensors")
        yield Hasher.hash(SQSDScorer(pack))
        yield Hasher.hash(SQSDScorer(packs["gpt2"]))
        yield Hasher.hash(SQSDScorer(pack, dtype="bfloat16"))
        yield Hasher.hash(SQSDScorer(pack, max_length=100))
        yield Hasher.hash(SQSDScorer(pack, columns=Columns(messages="chat")))
        yield Hasher.hash(SQSDScorer(pack, attention="eager"))
        yield Hasher.hash(SQSDScorer(pack, per_module=True))

    assert len(set(hashes())) == 9


def test_a_dtype_that_the_device_decides_counts(tiny_pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, half = Hasher.hash(SQSDScorer(tiny_pack)), Hasher.hash(SQSDScorer(tiny_pack, dtype="bfloat16"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert Hasher.hash(SQSDScorer(tiny_pack)) == half != on_cpu


def test_a_loaded_scorer_pickles_without_its_model(tiny_pack: Path) -> None:
    scorer = SQSDScorer(tiny_pack)
    before = pickle.dumps(scorer)
    risk = scorer({"messages": CONVERSATIONS[:1]})["sqsd_risk"]
    assert pickle.dumps(scorer) == before
    assert pickle.loads(before)({"messages": CONVERSATIONS[:1]})["sqsd_risk"] == risk
