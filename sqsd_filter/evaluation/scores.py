"""The scores under evaluation: several scorers' risks of the same rows, and those rows as a model learns them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sqsd_filter.corpus.addresses import Opener
from sqsd_filter.corpus.conversation import Message, RowError
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.evaluation.results import CorpusFile
from sqsd_filter.evaluation.sets import TrainingSet
from sqsd_filter.pipeline.selecting.consensus import check_same
from sqsd_filter.pipeline.selecting.earlier import Earlier, read_earlier
from sqsd_filter.pipeline.writing.destination import read_json
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.scoring.scorer import SQSD
from sqsd_filter.storage.layout import REPORT_FILE, homes_of
from sqsd_filter.wording import many

BATCH = 1024  # conversations encoded together


@dataclass(frozen=True)
class NamedScores:
    """One scorer's scores of a corpus, under the name of the scorer."""

    name: str
    earlier: Earlier

    @property
    def risk(self) -> np.ndarray:
        return self.earlier.scored.risk

    @property
    def scored(self) -> np.ndarray:
        return self.earlier.scored.scored

    @property
    def corpus(self) -> str:
        """16 hex digits, a hash of the rows' conversations."""
        return hashlib.blake2b(self.earlier.keys.tobytes(), digest_size=8).hexdigest()


def read_scores(given: Sequence[str | Path], opener: Opener, progress: Progress) -> list[NamedScores]:
    """The scores of each scorer, from a file that `sqsd-filter score` wrote or from a run's folder.

    A scorer is named as in its report. Where there is no report, or several name the same scorer, it is named after the
    file or folder. Raises `InputError` where scores are not of the same rows in the same order, and `UsageError` where
    two have one name.
    """
    first = read_earlier([given[0]], opener, None, progress, keyed=True)
    others = [read_earlier([one], opener, None, progress, keyed=True, likely=first.form) for one in given[1:]]
    for other in others:
        check_same(first, other)
    return [NamedScores(name, one) for name, one in zip(names(given), [first, *others], strict=True)]


def scored_by_all(scorers: Sequence[NamedScores], progress: Progress) -> np.ndarray:
    """Whether each row (n,) has a score by every scorer. Notes which scorers lack scores that others have."""
    scored_sn = np.array([each.scored for each in scorers])
    for each, count in zip(scorers, (scored_sn.any(0) & ~scored_sn).sum(1).tolist(), strict=True):
        if count:
            progress.note(
                f"{each.name} has no score for {many(count, 'row')} that another scorer has: nothing is learned from "
                "these"
            )
    return np.asarray(scored_sn.all(0))


def names(given: Sequence[str | Path]) -> list[str]:
    """The scorers' names, fit for a folder's name. Raises `UsageError` where two are the same."""
    reported = [scorer_of(one) for one in given]
    counts = Counter(reported)
    chosen = [
        name if name is not None and counts[name] == 1 else _stem(one)
        for name, one in zip(reported, given, strict=True)
    ]
    safe = [re.sub(r"[^\w.-]+|^\.+", "_", name) for name in chosen]
    if doubles := [name for name, count in Counter(safe).items() if count > 1]:
        raise UsageError(
            f"Two of the scores are called '{doubles[0]}', after their files or folders: rename one of these."
        )
    return safe


def scorer_of(given: str | Path) -> str | None:
    """The scorer that the report of these scores names, or the one of its pack's risks that it is by. None where it
    names neither."""
    report = _report(given)
    name = report.get("scorer")
    if name == SQSD:
        name = report.get("pack", {}).get("risk", name)
    return name if isinstance(name, str) else None


def corpus_of(given: str | Path, earlier: Earlier) -> list[CorpusFile]:
    """The files that were scored, and how many rows each has. Where this is unknown: the files with the scores."""
    inputs = _report(given).get("inputs") or earlier.scored.corpus.inputs
    return [{"name": path if "://" in (path := i["path"]) else Path(path).name, "rows": i["rows"]} for i in inputs]


def _report(given: str | Path) -> dict[str, Any]:
    """The report of the run that made these scores, empty where there is none."""
    homes = homes_of(Path(given))
    return next((report for home in homes if (report := read_json(home / REPORT_FILE))), {})


def _stem(given: str | Path) -> str:
    path = Path(given).absolute()
    return path.name if path.is_dir() else path.stem


class Rows:
    """The corpus's rows, encoded for the model that is fine-tuned. `tokens` (n,) counts each row's answer tokens, 0
    where there is nothing to learn."""

    def __init__(self, earlier: Earlier, encoder: ChatEncoder, progress: Progress) -> None:
        """Encodes all rows once, to count their tokens."""
        self._earlier, self._encoder = earlier, encoder
        self.tokens = np.zeros(len(earlier.keys), np.int64)
        progress.start("counting tokens", len(self.tokens))
        for index, encoded in self._encoded(np.arange(len(self.tokens))):
            self.tokens[index] = int(encoded.answer.sum())
            progress.advance(1)
        progress.finish()

    def encoded(self, chosen: TrainingSet) -> list[Encoded]:
        """The rows of a set, in row order, each with the answer tokens that the set gives it."""
        rows = self._encoded(chosen.rows)
        return [shortened(row, limit) for (_, row), limit in zip(rows, chosen.tokens.tolist(), strict=True)]

    def _encoded(self, indices: np.ndarray) -> Iterator[tuple[int, Encoded]]:
        rows = conversations(self._earlier, indices)
        while batch := list(islice(rows, BATCH)):
            for (index, _), row in zip(batch, self._encoder.encode([turns for _, turns in batch]), strict=True):
                if isinstance(row, Encoded):
                    yield index, row


def shortened(row: Encoded, tokens: int) -> Encoded:
    """The row cut to at most `tokens` ≥ 1 answer tokens. The last one still ends the answer, as before."""
    positions = np.flatnonzero(row.answer)
    if len(positions) <= tokens:
        return row
    head = np.arange(positions[tokens - 1])
    kept = np.append(head, positions[-1])
    return Encoded(row.ids[kept], row.answer[kept])


def prompts_of(earlier: Earlier) -> np.ndarray:
    """A number for each scored row, from 0: rows whose last answer is to the same turns have the same number."""
    assert earlier.form is not None
    scored = np.flatnonzero(earlier.scored.scored)
    numbers: dict[str, int] = {}
    prompts = np.arange(len(earlier.scored.scored)) + len(scored)  # a row that can't be read has a prompt of its own
    for index, turns in conversations(earlier, scored):
        last = max(k for k, turn in enumerate(turns) if turn["role"] == "assistant")
        asked = json.dumps([[turn["role"], turn["content"]] for turn in turns[:last]])
        prompts[index] = numbers.setdefault(asked, len(numbers))
    return np.unique(prompts[scored], return_inverse=True)[1]


def conversations(earlier: Earlier, indices: np.ndarray) -> Iterator[tuple[int, list[Message]]]:
    """The conversations of these rows (ascending), each with its index."""
    assert earlier.form is not None
    if not len(indices):
        return
    wanted = set(indices.tolist())
    for row in earlier.scored.corpus.read(int(indices[0]), int(indices[-1]) + 1, earlier.form.columns):
        if row.index in wanted and row.value is not None:
            with suppress(RowError):  # a file may have scores for rows that hold no conversation
                yield row.index, earlier.form.conversation(row.value)


def poison_scores(
    given: Sequence[str | Path],
    benign: Sequence[NamedScores],
    sources: Sequence[str | Path],
    opener: Opener,
    progress: Progress,
) -> list[Earlier]:
    """The scores of known unsafe rows, the k-th by the k-th scorer of `benign`, which are the scores in `sources`.

    Raises `UsageError` where there are not as many, `InputError` where the scorer, pack or settings differ.
    """
    if len(given) != len(benign):
        raise UsageError(f"Name unsafe rows for each of the {len(benign)} scores with --poison, in the same order.")
    unsafe = []
    for poison, source, scores in zip(given, sources, benign, strict=True):
        one = read_earlier([poison], opener, None, progress, keyed=True, likely=scores.earlier.form)
        facts = zip(_facts(source, scores.earlier), _facts(poison, one), strict=True)
        for (what, here), (_, there) in facts:
            if None not in (here, there) and here != there:
                raise InputError(
                    f"{source} was scored with the {what} {here}, but {poison} with {there}: score both alike."
                )
        if not one.scored.scored.any():
            raise InputError(f"No row of {poison} has a score: name unsafe rows that can be scored.")
        unsafe.append(one)
    return unsafe


def _facts(given: str | Path, earlier: Earlier) -> list[tuple[str, object]]:
    """What two scores must have in common to be compared; None where it is unknown."""
    report, pack = _report(given), earlier.pack
    return [
        ("pack", pack.get("fingerprint") if pack else None),
        *((name, report.get(name)) for name in ("scorer", "max_length", "dtype")),
    ]
