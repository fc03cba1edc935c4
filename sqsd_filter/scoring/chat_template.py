"""Renders a conversation with the model's own chat template and locates its answers in the text.

A template is an arbitrary program, so answers are located by a second rendering, with marks in their place. Where the
two renderings don't fit together, the row is a `template_error`, never a guess.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, product
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from sqsd_filter.corpus.conversation import (
    BAD_ROW,
    NO_ANSWER,
    REASONING,
    TEMPLATE_ERROR,
    TOOLS,
    Message,
    RowError,
    is_supervised,
)
from sqsd_filter.errors import ModelError
from sqsd_filter.scoring.deadlines import DeadlineExceeded, deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Span = tuple[int, int]
SECONDS = 10.0  # a rendering may take; it takes some microseconds
REASONING_KEYS = (REASONING, "thinking", "reasoning")  # by which templates know an answer's reasoning
# A prompt that ends with an opening tag, or with an empty block
_OPENED = re.compile(r"(?P<tag><(?P<name>[\w:]+)>)(?P<space>\s*)(?P<closing></(?P=name)>\s*)?\Z")


class _Frame(NamedTuple):
    """How the template shows an answer.

    The template's own text is `opening` before the first mark, `closing` after the last one, and `end`, which ends the
    turn. `shown` are the forms that the answer itself, with opening and closing, may have.
    """

    opening: str
    closing: str
    end: str
    shown: tuple[str, ...]


class _Reasoning(NamedTuple):
    """The key of a turn from which the template takes its reasoning, and the template's own text around it: `opening`
    before it, `between` after it and before the answer."""

    key: str
    opening: str
    between: str


@dataclass
class ChatTemplate:
    """A tokenizer's chat template, with properties found by rendering small conversations.

    Every assistant turn is an answer, unless its weight is 0. The answer is its reasoning where the template shows it,
    its text, its tool calls as the template writes them, and the token that ends the turn, but nothing that the
    template adds after that. If the last answer is text alone, it follows the template's generation prompt, as in
    generation. With a template that ignores tool calls, an answer is its text.

    A system turn that the template refuses stands before the text of the first user turn with `folds_system`, as
    LLaMA-Factory trains such models.

    Raises `ModelError` when the template can't render a plain question and answer.
    """

    tokenizer: PreTrainedTokenizerBase
    kwargs: Mapping[str, object] = field(default_factory=dict)
    folds_system: bool = False
    told: set[str] = field(default_factory=set)  # what has been said of this tokenizer's template

    def __post_init__(self) -> None:
        self._refuse_powers()
        self.special = set(self.tokenizer.all_special_ids) | {
            i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        self._reasons: _Reasoning | None = None
        self._learn_turn()
        self.calls = self._learn_calls()
        self._reasons = self._learn_reasoning()
        self.refuses_system = self._learn_system()

    def _refuse_powers(self) -> None:
        """Raise `ModelError` for a template with a power: 9**9**9 can't be ended, not even while it is compiled."""
        given = self.kwargs.get("chat_template") or self.tokenizer.chat_template
        for template in given.values() if isinstance(given, Mapping) else [given]:
            try:
                parsed = Environment(extensions=[loopcontrols, _Generation]).parse(str(template))
            except (TemplateError, RecursionError):  # the first rendering says why
                continue
            if parsed.find(nodes.Pow) is not None:
                raise ModelError("The chat template computes a power (**), which may never end: give one without.")

    def render(self, turns: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text up to the end of the last answer, and the range of characters of each answer.

        Raises `RowError`.
        """
        _check_texts(turns)
        turns = self._shown_reasoning(self._folded(turns))
        if self.calls is None:
            turns = [{name: value for name, value in t.items() if name != "tool_calls"} for t in turns]
        last = last_answer(turns)
        if "tool_calls" in turns[last]:
            text = self._apply(turns[: last + 1])
            *spans, (start, stop, end) = self._locate(turns[: last + 1], text)
            text = text[:stop]
        else:
            prompt, end = self._apply(turns[:last], asks=True), self._end
            spans = self._locate(turns[:last], prompt, asks=True)
            before, answer = self._answered(turns[: last + 1], prompt)
            text, start = before + answer, len(before)
        text += end
        return text, [*((start, stop + len(end)) for start, stop, end in spans), (start, len(text))]

    def _answered(self, turns: Sequence[Message], prompt: str) -> tuple[str, str]:
        """The text before the last turn's text, and that text.

        It is taken as the template shows it after the prompt, or unchanged where the template shows it differently
        there. A block that the prompt has opened is not opened again.
        """
        whole, answer = self._apply(turns), turns[-1]["content"]
        before = prompt + self._lead
        if not whole.startswith(before):
            if self._asks:
                before = prompt
            elif whole.startswith(prompt):  # the lead has the turn's header, and perhaps an empty block
                before = _shared(before, whole)
        shown = whole[len(before) :].removesuffix(self._tail)
        if shown.strip() and whole == before + shown + self._tail:
            return before, shown
        if REASONING in turns[-1]:
            raise RowError(TEMPLATE_ERROR, "the chat template shows the answer's reasoning in another form")
        answer = answer.strip() if self._trims else answer
        opened = _OPENED.search(before)
        if opened is None or not answer.lstrip().startswith(opened["tag"]):
            return before, answer
        answer = answer.lstrip().removeprefix(opened["tag"])
        space = _shared(opened["space"], answer)
        if opened["closing"]:  # an empty block, which the answer fills
            before = before[: opened.end("tag")] + space
        return before, answer.removeprefix(space)

    def _locate(self, turns: Sequence[Message], text: str, *, asks: bool = False) -> list[tuple[int, int, str]]:
        """The range of each answer in `text`, the rendering of these turns, and the text that ends its turn there."""
        answers = [k for k, t in enumerate(turns) if is_supervised(t)]
        if not answers:
            return []
        salt = next(n for n in count() if _mark(0, n)[-9:] not in text)
        marks = [_mark(n, salt) for n in range(len(answers))]
        marked = list(turns)
        for k, mark in zip(answers, marks, strict=True):
            marked[k] = _marked(turns[k], mark)
        rest = self._apply(marked, asks=asks)
        frames, pieces = [], []  # the template's own text between the answers
        for k, mark in zip(answers, marks, strict=True):
            frame = self._frame(turns, k, mark, _mark(len(answers), salt))
            before, separator, rest = rest.partition(mark)
            if not separator:
                raise RowError(TEMPLATE_ERROR, "the chat template leaves out an earlier assistant turn")
            if not turns[k].keys().isdisjoint(("tool_calls", REASONING)):  # several parts are marked
                rest = rest.rpartition(mark)[2]
            opening = next(filter(before.endswith, self._with_and_without_lead(frame.opening)), None)
            if opening is None or not rest.startswith(frame.closing):
                raise RowError(TEMPLATE_ERROR, "the chat template shows an earlier tool call in different forms")
            pieces.append(before.removesuffix(opening))
            rest = rest.removeprefix(frame.closing)
            frames.append(frame)
        pieces.append(rest)

        spans, at = [], 0
        for k, frame, piece, following in zip(answers, frames, pieces, pieces[1:], strict=False):
            at += len(piece)
            for shown in frame.shown:
                if text.startswith(shown + following, at):
                    break
            else:  # the template changes earlier answers (drops their reasoning, say): take what it shows
                stop = text.find(following, at)
                if stop < 0 or not text.startswith(piece, at - len(piece)):
                    raise RowError(TEMPLATE_ERROR, "the chat template rewrites an earlier assistant turn")
                shown = text[at:stop]
            final = not asks and k == len(turns) - 1
            end = frame.end if final or following.startswith(frame.end) else ""
            if shown.strip():
                lead = self._lead if "tool_calls" in turns[k] and shown.startswith(self._lead) else ""
                spans.append((at + len(lead), at + len(shown), end))
            at += len(shown)
        if at + len(pieces[-1]) != len(text):
            raise RowError(TEMPLATE_ERROR, "the chat template rewrites an earlier assistant turn")
        return spans

    def _frame(self, turns: Sequence[Message], k: int, mark: str, before: str) -> _Frame:
        """How answer `k` is shown. `before` is a different mark, for the turn before it.

        The template writes a tool call in its own form. It begins after the generation prompt, or else where the turn,
        rendered as the last one, starts to differ from a plain answer in its place. It ends where the text that follows
        a plain answer begins, or else with its last special token.
        """
        turn = turns[k]
        if "tool_calls" not in turn:
            contents = (turn["content"], turn["content"].strip())
            if REASONING not in turn or self._reasons is None:
                return _Frame("", "", self._end, contents)
            thoughts = (turn[REASONING], turn[REASONING].strip())
            opening, between = self._reasons.opening, self._reasons.between
            return _Frame(
                opening, "", self._end, tuple(opening + t + between + c for t, c in product(thoughts, contents))
            )
        _something_before(turns, k)

        def after_before(*more: Message) -> str:
            text = self._apply([*turns[: k - 1], _marked(turns[k - 1], before), *more], asks=not more)
            _, separator, rest = text.rpartition(before)
            if not separator:
                raise RowError(TEMPLATE_ERROR, "the chat template leaves out the turn before a tool call")
            return rest

        prompt, marked, shown = after_before(), after_before(_marked(turn, mark)), after_before(turn)
        start = len(prompt)
        if not marked.startswith(prompt if self._asks else prompt + self._lead):
            plain = after_before({"role": "assistant", "content": mark})
            start = min(len(_shared(marked, plain)), plain.find(mark))
        if start < 0 or mark not in marked[start:]:
            raise RowError(TEMPLATE_ERROR, "the chat template leaves out a tool call")
        closing, end, rest = marked.rpartition(mark)[2], self._end, self._tail
        if not closing.endswith(rest):
            end, rest = "", closing[max(self._specials(closing), default=len(closing)) :]
        closing = closing.removesuffix(rest)
        fits = shown.startswith(marked[:start]) and shown.endswith(rest)
        whole = self._with_and_without_lead(shown[start : len(shown) - len(rest)]) if fits else ()
        return _Frame(marked[start : marked.index(mark)], closing, end, whole)

    def _with_and_without_lead(self, text: str) -> tuple[str, str]:
        return text, text.removeprefix(self._lead)

    def _apply(self, turns: Sequence[Message], *, asks: bool = False) -> str:
        """Render the turns, with `asks` also the generation prompt."""
        tools = next((t["content"] for t in turns if t["role"] == TOOLS), None)
        options: dict[str, Any] = {**self.kwargs, **({"tools": tools} if tools else {})}
        messages = [self._taken(t) for t in turns if t["role"] != TOOLS]
        try:
            with deadline(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=asks, **options
                )
        except DeadlineExceeded as problem:
            raise ModelError(
                f"The chat template takes more than {SECONDS:g} s for one conversation: give another one in the pack."
            ) from problem
        except Exception as problem:  # Jinja templates raise any exception
            raise RowError(TEMPLATE_ERROR, f"the chat template refuses it: {problem}") from problem
        assert isinstance(text, str)
        return text

    def _taken(self, turn: Message) -> Message:
        """A turn in the form that the template expects."""
        turn = {name: value for name, value in turn.items() if name != "weight"}
        if REASONING in turn and self._reasons is not None:
            turn[self._reasons.key] = turn.pop(REASONING)
        if "tool_calls" in turn:
            assert self.calls is not None
            empty, as_text = self.calls
            if not (turn["content"] or empty):
                del turn["content"]
            if as_text:
                turn["tool_calls"] = [_with_arguments(call, _json) for call in turn["tool_calls"]]
        return turn

    def _learn_turn(self) -> None:
        """Find out whether there is a generation prompt and whether an answer is trimmed; find the text between the
        generation prompt and an answer (mostly none), the text after an answer, and its part up to the token that ends
        the turn."""
        mark = _mark()
        ask = {"role": "user", "content": "x"}
        try:
            prompt = self._apply([ask], asks=True)
            self._asks = prompt != self._apply([ask])
            plain = self._apply([ask, {"role": "assistant", "content": mark}])
            self._trims = plain == self._apply([ask, {"role": "assistant", "content": f" {mark} "}])
        except RowError as problem:
            raise ModelError(f"The chat template fails on a plain question and answer: {problem.detail}") from problem
        before, separator, self._tail = plain.partition(mark)
        if not separator:
            raise ModelError("The chat template leaves out the assistant's turn: give another one in the pack.")
        self._lead = before[len(prompt) :] if before.startswith(prompt) else ""
        stop = min(self._specials(self._tail), default=None)
        self._end = self._tail[:stop] if stop else self.tokenizer.eos_token or ""

    def _learn_calls(self) -> tuple[bool, bool] | None:
        """The form in which the template expects tool calls: whether their turn has empty text rather than none, and
        whether their arguments are JSON text rather than an object. None where the template shows them in no form."""
        mark = _mark()
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {mark: mark}}}
        turns: list[Message] = [{"role": "user", "content": "x"}]
        turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
        for form in product((True, False), (False, True)):
            self.calls = form
            try:
                text = self._apply(turns)
            except RowError:
                continue
            if mark in text and repr({mark: mark}) not in text:
                return form
        return None

    def _learn_reasoning(self) -> _Reasoning | None:
        """The key under which the template expects an answer's reasoning, and its own text around it. None where it
        shows no reasoning."""
        thought, said = _mark(), _mark(1)
        ask = {"role": "user", "content": "x"}
        for key in REASONING_KEYS:
            try:
                text = self._apply([ask, {"role": "assistant", "content": said, key: thought}])
                plain = self._apply([ask, {"role": "assistant", "content": said}])
            except RowError:
                continue
            before, shown, rest = text.partition(thought)
            between, said_after, _ = rest.partition(said)
            if shown and said_after:
                start = len(_shared(before, plain.partition(said)[0].removesuffix(self._lead)))
                return _Reasoning(key, before[start:], between)
        return None

    def _learn_system(self) -> bool:
        """Does the template refuse a system turn?"""
        turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
        try:
            self._apply(turns)
        except RowError:
            return True
        return False

    def _folded(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns with a system turn that the template refuses before the text of the user turn that follows it."""
        at = next((k for k, turn in enumerate(turns) if turn["role"] != TOOLS), 0)
        pair = turns[at : at + 2]
        if not (self.refuses_system and self.folds_system) or [t["role"] for t in pair] != ["system", "user"]:
            return turns
        self._tell("the chat template refuses system prompts: they are put before the first user turn (--system)")
        system, user = (turn["content"] for turn in pair)
        return [*turns[:at], {**pair[1], "content": f"{system}\n\n{user}"}, *turns[at + 2 :]]

    def _shown_reasoning(self, turns: Sequence[Message]) -> Sequence[Message]:
        """The turns without the reasoning that the template leaves out there, in earlier turns mostly."""
        reasoned = [k for k, turn in enumerate(turns) if REASONING in turn]
        if not reasoned:
            return turns
        if self._reasons is None:
            self._tell("the chat template shows no reasoning: it is not scored")
            hidden = reasoned
        else:
            salt = next(n for n in count() if _mark(0, n)[-9:] not in _json(list(turns)))
            marks = {k: _mark(k, salt) for k in reasoned}
            text = self._apply([{**turn, REASONING: marks[k]} if k in marks else turn for k, turn in enumerate(turns)])
            hidden = [k for k, mark in marks.items() if mark not in text]
        return [_without_reasoning(turn) if k in hidden else turn for k, turn in enumerate(turns)]

    def _tell(self, message: str) -> None:
        """Say it once."""
        if message not in self.told:
            self.told.add(message)
            log.warning("%s", message)

    def _specials(self, text: str) -> list[int]:
        """The positions at which the special tokens of a text end."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [stop for token, (_, stop) in pairs if token in self.special]


class _Generation(Extension):
    """Lets `{% generation %}` be parsed, which only transformers knows."""

    tags = {"generation"}  # noqa: RUF012  declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def last_answer(turns: Sequence[Message]) -> int:
    """The number of the last supervised turn.

    Raises `RowError` if there is none, if no turn stands before it, and for content that is not text.
    """
    _check_texts(turns)
    last = max((k for k, t in enumerate(turns) if is_supervised(t)), default=None)
    if last is None:
        raise RowError(NO_ANSWER, "no assistant turn has text")
    _something_before(turns, last)
    try:
        _json(turns).encode()
    except UnicodeEncodeError as problem:
        raise RowError(BAD_ROW, "a turn holds half of a surrogate pair, which is not text") from problem
    return last


def _check_texts(turns: Sequence[Message]) -> None:
    if any(not isinstance(t["content"], str) for t in turns if t["role"] != TOOLS):
        raise RowError(BAD_ROW, "a turn's content is not text")


def _something_before(turns: Sequence[Message], k: int) -> None:
    if all(t["role"] == TOOLS for t in turns[:k]):
        raise RowError(BAD_ROW, "no turn stands before the answer")


def _mark(k: int = 0, salt: int = 0) -> str:
    return f"[[answer-{k}-{salt:06x}]]"


def _marked(turn: Message, mark: str) -> Message:
    """The turn with a mark in place of its text and of the arguments of each of its tool calls."""
    thought = {REASONING: mark} if REASONING in turn else {}
    if "tool_calls" not in turn:
        return {**turn, **thought, "content": mark}
    calls = [_with_arguments(call, lambda _: {mark: mark}) for call in turn["tool_calls"]]
    said = mark if turn["content"].strip() else turn["content"]
    return {**turn, **thought, "content": said, "tool_calls": calls}


def _without_reasoning(turn: Message) -> Message:
    return {name: value for name, value in turn.items() if name != REASONING}


def _shared(a: str, b: str) -> str:
    """The longest common prefix, by halving: texts may be long."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return a[:low]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_arguments(call: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": change(function["arguments"])}}
