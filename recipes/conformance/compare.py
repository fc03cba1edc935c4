"""Where trainers learn the same tokens as are scored here: prints the tables of docs/rows.md.

    python recipes/conformance/compare.py

It reads what trainers.py wrote into golden/. Two results have the same ids if their tokens are the same up to the last
one that is learned, and the same labels if the same of them are learned. What a template writes after the last answer
changes nothing that is learned, so it is not compared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqsd_filter.corpus.conversation import RowError
from sqsd_filter.corpus.row_formats import Columns
from sqsd_filter.scoring.chat_encoder import ChatEncoder

sys.path.insert(0, str(Path(__file__).resolve().parent))

import trainers

NAMES = {"trl": "TRL", "llamafactory": "LLaMA-Factory", "axolotl": "axolotl"}
SAME, LINE_END, NOTHING, OTHER = "same", "line end", "nothing", "other"  # what a comparison may find

Result = Mapping[str, Any]  # as in a golden file
Case = tuple[str, str, str]  # trainer, template, row


@dataclass(frozen=True)
class Difference:
    """Rows that trainers learn otherwise than they are scored here, on purpose, and why."""

    why: str
    trl: str = ""  # names of rows
    llamafactory: str = ""
    axolotl: str = ""

    def rows(self, trainer: str) -> list[str]:
        return str(getattr(self, trainer)).split()


_MARKED = "weight-0 weight-0-last train-false"
_IN_PART = "train-detail-part train-question"
_SHAREGPT = "sharegpt sharegpt-system sharegpt-system-column sharegpt-user sharegpt-call sharegpt-think-call"
DIFFERENCES = (
    Difference(
        "Marks of what is learned are honoured. TRL and LLaMA-Factory know none and learn the turn. axolotl learns the "
        "end of a turn all of whose parts are taken out.",
        trl=f"{_MARKED} train-detail-none",
        llamafactory=f"{_MARKED} train-detail-none",
        axolotl="train-detail-none",
    ),
    Difference(
        "A turn that is learned in part, and a question that is learned, make the row a `bad_row`.",
        trl=f"{_IN_PART} part-weight-0",
        llamafactory=_IN_PART,
        axolotl=f"{_IN_PART} part-weight-0",
    ),
    Difference(
        "An empty answer has nothing to score. The trainers learn the end of its turn.",
        trl="empty-answer empty-first-answer",
        llamafactory="empty-answer empty-first-answer",
    ),
    Difference(
        "`developer` is read as `system`. The trainers pass it on or refuse it.",
        trl="developer",
        llamafactory="developer",
        axolotl="developer",
    ),
    Difference(
        "System turns at the beginning become one, since many templates show only the first.",
        trl="two-systems",
        llamafactory="two-systems",
        axolotl="two-systems",
    ),
    Difference(
        "A system prompt that the template refuses stands before the first question, as LLaMA-Factory trains it.",
        trl="system system-two-turns empty-system system-of-many-lines prompt-completion-of-many-turns "
        "preference-system",
        axolotl="system system-two-turns empty-system system-of-many-lines system-column sharegpt-system "
        "sharegpt-system-column",
    ),
    Difference("A column `system` is read.", trl="system-column"),
    Difference(
        "A prompt and an answer as text are a conversation, which the template renders. TRL learns plain text.",
        trl="prompt-completion preference-text",
    ),
    Difference(
        "Of an answer with several turns, only the assistant's are learned. So does TRL with `assistant_only_loss`; "
        "otherwise it learns the tools' results, too.",
        trl="completion-of-many-turns",
    ),
    Difference(
        "What the trainer refuses is read: ShareGPT (TRL with `assistant_only_loss`), turns that don't alternate or "
        "that end with a question, and tools that are no JSON text (LLaMA-Factory).",
        trl=_SHAREGPT,
        llamafactory="late-system two-answers-in-a-row starts-with-answer ends-with-question two-questions-in-a-row "
        "tools-list",
    ),
    Difference(
        "Parts of a content are joined. TRL leaves them to the template, LLaMA-Factory refuses them.",
        trl="text-parts",
        llamafactory="text-parts",
    ),
    Difference(
        "A row's `chat_template_kwargs` reach the template, as with TRL.",
        llamafactory="template-settings",
        axolotl="template-settings",
    ),
    Difference(
        "Reasoning is learned where the template shows it, as with TRL and axolotl.",
        llamafactory="reasoning-content reasoning-in-two-turns",
    ),
    Difference("An empty system turn is shown, as with TRL and axolotl.", llamafactory="empty-system"),
    Difference(
        "The template may trim texts, and the text is tokenised as a whole, as with TRL and axolotl. LLaMA-Factory "
        "trims nothing and tokenises prompt and answer apart.",
        llamafactory="system-of-many-lines answer-of-many-lines answer-after-line-ends answer-in-spaces "
        "question-in-spaces prompt-completion",
    ),
    Difference(
        "The template writes tool calls and results. LLaMA-Factory's form `openai` adds `detailed thinking off` or a "
        "line end to the system prompt, leaves out text before a call, quotes arguments that are JSON text, and joins "
        "results in Qwen's form.",
        llamafactory="tool-call-with-system tool-call-as-text tool-call-after-text tool-call-unlisted two-results "
        "unicode-call",
    ),
    Difference(
        "A turn `function_call` is a tool call, which the template writes. LLaMA-Factory keeps the blank line after "
        "its thought, axolotl takes it for a role that is not learned.",
        llamafactory="sharegpt-think-call",
        axolotl="sharegpt-call sharegpt-think-call",
    ),
    Difference(
        "A long row is cut at its end, as by TRL. LLaMA-Factory cuts prompt and answer, axolotl drops the row.",
        llamafactory="long-question long-both",
        axolotl="long-answer long-both long-second-turn",
    ),
)


def encode(template: str) -> dict[str, dict[str, Any]]:
    """What is scored of each row, in the form of a golden file; where nothing is, the status of the row."""
    encoded: dict[str, dict[str, Any]] = {}
    encoder = ChatEncoder(trainers.make_tokenizer(template), folds_system=True)
    for given in trainers.read_rows():
        encoder.max_length = given.get("max_length", trainers.MAX_LENGTH)
        for answer in trainers.answers_of(given):
            single = answer == "answer"
            turns = Columns(answer=None if single else answer).choose([given["row"]]).parse(given["row"])
            result = turns if isinstance(turns, RowError) else encoder.encode([turns])[0]
            name = given["name"] if single else f"{given['name']}:{answer}"
            if isinstance(result, RowError):
                encoded[name] = {"nothing": result.status}
            else:
                ids = result.ids.tolist()
                labels = [k if learned else trainers.IGNORED for k, learned in zip(ids, result.answer, strict=True)]
                encoded[name] = {"ids": ids, "learned": trainers.learned_ranges(ids, labels)}
    return encoded


def compare(theirs: Result, ours: Result, end: int, line_end: int) -> tuple[str, bool]:
    """What is so of two results, and whether their ids are the same. `end` and `line_end` are the tokens that end a
    turn and a line: some trainers learn the line end after a turn, too."""
    if "nothing" in theirs or "nothing" in ours:
        return (NOTHING if "nothing" in theirs and "nothing" in ours else OTHER), False
    ids, learned = _positions(theirs)
    own_ids, own = _positions(ours)
    after = {k for k in learned if k - 1 in learned and ids[k] == line_end and ids[k - 1] == end}
    found = SAME if learned == own else LINE_END if learned - after == own else OTHER
    same_ids = ids[: max(learned - after) + 1] == own_ids[: max(own) + 1]
    return (found if same_ids else OTHER), same_ids


def _positions(result: Result) -> tuple[Sequence[int], set[int]]:
    return result["ids"], {k for start, stop in result["learned"] for k in range(start, stop)}


def compare_all() -> dict[Case, tuple[str, bool]]:
    """Each result of the golden files beside ours. Raises `ValueError` if the files are of other rows or templates."""
    found: dict[Case, tuple[str, bool]] = {}
    golden = {name: read_golden(name) for name in NAMES}
    for template in trainers.TEMPLATES:
        ours, tokenizer = encode(template), trainers.make_tokenizer(template)
        (line_end,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
        for trainer, results in golden.items():
            for row, theirs in results[template].items():
                compared = compare(theirs, ours[row], tokenizer.eos_token_id, line_end)
                found[trainer, template, row] = compared
    return found


def read_golden(trainer: str) -> dict[str, Any]:
    """What trainers.py wrote. Raises `ValueError` if its rows, tokenizer or templates have changed since."""
    golden: dict[str, Any] = json.loads((trainers.GOLDEN / f"{trainer}.json").read_text(encoding="utf-8"))
    if golden["inputs"] != trainers.digest():
        raise ValueError(f"golden/{trainer}.json is of other rows or templates: run trainers.py {trainer} again")
    return golden


def reasons(case: Case) -> list[Difference]:
    """The differences that name this case."""
    trainer, _, row = case
    return [difference for difference in DIFFERENCES if row.partition(":")[0] in difference.rows(trainer)]


def count_lines(found: Mapping[Case, tuple[str, bool]]) -> list[str]:
    """The table of counts."""
    lines = []
    for trainer, title in NAMES.items():
        release = read_golden(trainer)["versions"][trainer]
        for template in trainers.TEMPLATES:
            results = [result for case, result in found.items() if case[:2] == (trainer, template)]
            kinds = [kind for kind, _ in results]
            counts = [kinds.count(kind) for kind in (SAME, LINE_END, NOTHING, OTHER)]
            same_ids = sum(same for _, same in results)
            lines.append(
                f"| {title} {release} | {template} | {len(results)} | {same_ids} | {' | '.join(map(str, counts))} |"
            )
    return lines


def difference_lines() -> list[str]:
    """The table of differences."""
    lines = []
    for difference in DIFFERENCES:
        rows: dict[str, list[str]] = {}
        for trainer, title in NAMES.items():
            if names := ", ".join(difference.rows(trainer)):
                rows.setdefault(names, []).append(title)
        named = "; ".join(f"{', '.join(titles)}: {names}" for names, titles in rows.items())
        lines.append(f"| {difference.why} | {named} |")
    return lines


def main() -> None:
    """Print both tables, and on stderr what differs without a reason."""
    found = compare_all()
    for case, (kind, _) in found.items():
        if kind == OTHER and not reasons(case):
            print(*case, "differs without a reason", file=sys.stderr)
    print("| trainer | template | rows | same ids | same labels | but for line ends | neither learns | differ |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", *count_lines(found), sep="\n")
    print("\n| what is so here | rows that differ |\n| --- | --- |", *difference_lines(), sep="\n")


if __name__ == "__main__":
    main()
