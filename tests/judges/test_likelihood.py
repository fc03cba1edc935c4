"""Mean log-probabilities are those of a textbook loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sqsd_filter.judges import likelihood
from sqsd_filter.judges.likelihood import log_probabilities
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.models import load_model, load_tokenizer
from tests.tiny import ARCHITECTURES, CONVERSATIONS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_has_the_mean_log_probability_of_a_textbook_loop(
    packs: dict[str, Path], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = str(packs[architecture] / "base")
    model = load_model(base, dtype=torch.float64)
    rows = [row for row in ChatEncoder(load_tokenizer(base), 200).encode(CONVERSATIONS) if isinstance(row, Encoded)]
    assert len(rows) == len(CONVERSATIONS)
    expected = []
    for row in rows:
        tokens = []
        for t in np.flatnonzero(row.answer).tolist():
            with torch.no_grad():
                given = model(input_ids=torch.from_numpy(row.ids[None, :t])).logits[0, -1]
            tokens.append(float(given[row.ids[t]] - given.logsumexp(0)))
        expected.append(sum(tokens) / len(tokens))
    for budget in (1, 300, 10_000):  # alone, some together, all together
        monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", budget)
        np.testing.assert_allclose(log_probabilities(model, rows), expected, rtol=1e-9)


def test_half_precision_logits_are_summed_in_float32(tiny_pack: Path) -> None:
    base = str(tiny_pack / "base")
    rows = [row for row in ChatEncoder(load_tokenizer(base), 200).encode(CONVERSATIONS) if isinstance(row, Encoded)]
    exact, rough = (log_probabilities(load_model(base, dtype=d), rows) for d in (torch.float64, torch.bfloat16))
    np.testing.assert_allclose(rough, exact, rtol=0.02)


def test_no_rows_have_no_log_probabilities(tiny_pack: Path) -> None:
    assert log_probabilities(load_model(str(tiny_pack / "base"), dtype=torch.float32), []).shape == (0,)
