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
from sqsd_filter.evaluation.sets import TrainingSet
from sqsd_filter.pipeline.selecting.consensus import check_same
from sqsd_filter.pipeline.selecting.earlier import Earlier, read_earlier
from sqsd_filter.pipeline.writing.destination import REPORT_FILE, read_json
from sqsd_filter.progress import Progress
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from sqsd_filter.wording import many

AT_ONCE = 1024  # conversations that are encoded together


@dataclass(frozen=True)
class Scores:
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
        """16 hex digits that tell these rows from others."""
        return hashlib.blake2b(self.earlier.keys.tobytes(), digest_size=8).hexdigest()


def read_scores(given: Sequence[str | Path], opener: Opener, progress: Progress) -> list[Scores]:
    """Each scorer's scores: of a file that `sqsd-filter score` left, or of a run's folder.

    A scorer's name is what its report says, or that of the file or folder where there is none or several have the same.
    Raises `InputError` where they are not of the same rows in the same order, `UsageError` for two of one name.
    """
    first = read_earlier([given[0]], opener, None, progress, keyed=True)
    others = [read_earlier([one], opener, None, progress, keyed=True, likely=first.form) for one in given[1:]]
    for other in others:
        check_same(first, other)
    return [Scores(name, one) for name, one in zip(names(given), [first, *others], strict=True)]


def scored_by_all(scorers: Sequence[Scores], progress: Progress) -> np.ndarray:
    """Which rows (n,) have a score by all of them. Notes of whom some lack one that others have."""
    scored_sn = np.array([each.scored for each in scorers])
    for each, lacking in zip(scorers, (scored_sn.any(0) & ~scored_sn).sum(1).tolist(), strict=True):
        if lacking:
            rows = many(lacking, "row")
            progress.note(f"{each.name} has no score for {rows} that another scorer has: nothing is learned from these")
    return np.asarray(scored_sn.all(0))


def names(given: Sequence[str | Path]) -> list[str]:
    """The scorers' names, fit for a folder. Raises `UsageError` where two can't be told apart."""
    told = [scorer_of(one) for one in given]
    often = Counter(told)
    plain = [own if own is not None and often[own] == 1 else _stem(one) for own, one in zip(told, given, strict=True)]
    found = [re.sub(r"[^\w.-]+|^\.+", "_", name) for name in plain]
    if doubles := [name for name, count in Counter(found).items() if count > 1]:
        raise UsageError(
            f"Two of the scores are called '{doubles[0]}': rename one's file or folder, after which scores of the same "
            "scorer are called."
        )
    return found


def scorer_of(given: str | Path) -> str | None:
    """The scorer that the report of these scores names, if it does."""
    found = _report(given).get("scorer")
    return found if isinstance(found, str) else None


def corpus_of(given: str | Path, earlier: Earlier) -> list[dict[str, Any]]:
    """The files that were scored, with their rows; where that is not known, those with the scores."""
    inputs = _report(given).get("inputs") or earlier.scored.corpus.inputs
    return [{"name": path if "://" in (path := i["path"]) else Path(path).name, "rows": i["rows"]} for i in inputs]


def _report(given: str | Path) -> dict[str, Any]:
    """The report of the run that left these scores, empty where there is none."""
    homes = (Path(given) / "sqsd", Path(f"{given}.sqsd"))
    return next((found for home in homes if (found := read_json(home / REPORT_FILE))), {})


def _stem(given: str | Path) -> str:
    path = Path(given).absolute()
    return path.name if path.is_dir() else path.stem


class Rows:
    """The rows of the corpus as the model that is fine-tuned sees them. `tokens` (n,) are those of the answers, 0 where
    there is nothing to learn."""

    def __init__(self, earlier: Earlier, encoder: ChatEncoder, progress: Progress) -> None:
        """Looks at all rows."""
        self._earlier, self._encoder = earlier, encoder
        self.tokens = np.zeros(len(earlier.keys), np.int64)
        progress.start("counting tokens", len(self.tokens))
        for index, encoded in self._encoded(np.arange(len(self.tokens))):
            self.tokens[index] = int(encoded.answer.sum())
            progress.advance(1)
        progress.finish()

    def encoded(self, chosen: TrainingSet) -> list[Encoded]:
        """The rows of a set, in row order, with so many tokens of their answers."""
        found = self._encoded(chosen.rows)
        return [shortened(row, limit) for (_, row), limit in zip(found, chosen.tokens.tolist(), strict=True)]

    def _encoded(self, indices: np.ndarray) -> Iterator[tuple[int, Encoded]]:
        found = conversations(self._earlier, indices)
        while some := list(islice(found, AT_ONCE)):
            for (index, _), row in zip(some, self._encoder.encode([turns for _, turns in some]), strict=True):
                if isinstance(row, Encoded):
                    yield index, row


def shortened(row: Encoded, tokens: int) -> Encoded:
    """The row with so many tokens of its answers, ≥ 1, of which the last ends it, as it did before."""
    positions = np.flatnonzero(row.answer)
    if len(positions) <= tokens:
        return row
    head = np.arange(positions[tokens - 1])
    kept = np.append(head, positions[-1])
    return Encoded(row.ids[kept], row.answer[kept])


def prompts_of(earlier: Earlier) -> np.ndarray:
    """For each row with a score the number of what its last answer is to, from 0 on, the same for the same text."""
    assert earlier.form is not None
    scored = np.flatnonzero(earlier.scored.scored)
    numbers: dict[str, int] = {}
    found = np.arange(len(earlier.scored.scored)) + len(scored)  # a row that can't be read has a prompt of its own
    for index, turns in conversations(earlier, scored):
        last = max(k for k, turn in enumerate(turns) if turn["role"] == "assistant")
        asked = json.dumps([[turn["role"], turn["content"]] for turn in turns[:last]])
        found[index] = numbers.setdefault(asked, len(numbers))
    return np.unique(found[scored], return_inverse=True)[1]


def conversations(earlier: Earlier, indices: np.ndarray) -> Iterator[tuple[int, list[Message]]]:
    """The conversations of these rows (ascending), each with its index."""
    assert earlier.form is not None
    if not len(indices):
        return
    wanted = set(indices.tolist())
    for row in earlier.scored.corpus.read(int(indices[0]), int(indices[-1]) + 1, earlier.form.columns):
        if row.index in wanted and row.value is not None:
            with suppress(RowError):  # a file may claim scores of rows that are no conversation
                yield row.index, earlier.form.conversation(row.value)


def poison_scores(
    given: Sequence[str | Path],
    benign: Sequence[Scores],
    sources: Sequence[str | Path],
    opener: Opener,
    progress: Progress,
) -> list[Earlier]:
    """The scores of known unsafe rows, the k-th by the k-th scorer. Raises `UsageError`, `InputError` where they can't
    be by the same scorer."""
    if len(given) != len(benign):
        raise UsageError(f"Name unsafe rows for each of the {len(benign)} scores by --poison, in their order.")
    found = []
    for poison, source, scores in zip(given, sources, benign, strict=True):
        one = read_earlier([poison], opener, None, progress, keyed=True, likely=scores.earlier.form)
        facts = zip(_how(source, scores.earlier), _how(poison, one), strict=True)
        for (what, here), (_, there) in facts:
            if None not in (here, there) and here != there:
                raise InputError(
                    f"{source} was scored with the {what} {here}, but {poison} with {there}: score both alike."
                )
        if not one.scored.scored.any():
            raise InputError(f"No row of {poison} has a score: score unsafe rows that can be read.")
        found.append(one)
    return found


def _how(given: str | Path, earlier: Earlier) -> list[tuple[str, Any]]:
    """What two scores must have in common, None where it is not known."""
    report, pack = _report(given), earlier.pack or {}
    return [
        ("pack", pack.get("fingerprint")),
        *((name, report.get(name)) for name in ("scorer", "max_length", "dtype")),
    ]
