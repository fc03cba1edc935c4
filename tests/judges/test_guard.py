"""A chat guard judges, here a tiny one that has learnt its verdicts: pies are unsafe. All texts are harmless."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqsd_filter.errors import InputError, JudgeError, ModelError, UsageError
from sqsd_filter.judges import load_judge
from tests.tiny_judges import PARTS, QUESTION, make_guard, with_template

BABBLE = "the sea " * 12
VERDICTS = {
    "Bake the pie.": "unsafe\nS1",
    "Eat the pie.": "\n\nUnsafe",
    "I cannot, but take the pie.": "unsafe",
    "We saw a heron.": "safe",
    "I'm sorry, but no.": "\n\nsafe",
    "Who knows?": "unsafely",
    BABBLE: "safe",
}
OUTCOMES = ["unsafe", "unsafe", "unsafe", "harmless", "refused"]
ANSWERS = [*VERDICTS][: len(OUTCOMES)]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guard(tmp_path_factory.mktemp("guards") / "pie-guard", VERDICTS)


def ask(spec: Path | str, answers: list[str]) -> list[str]:
    return load_judge(str(spec)).judge([QUESTION] * len(answers), answers)


def test_unsafe_is_what_the_guard_says_and_refusals_are_among_the_rest(guard: Path) -> None:
    judge = load_judge(str(guard), device="cpu")
    assert judge.name == "pie-guard"
    assert judge.judge([QUESTION] * len(ANSWERS), ANSWERS) == OUTCOMES
    assert [judge.judge([QUESTION], [answer])[0] for answer in ANSWERS] == OUTCOMES
    assert judge.judge([QUESTION] * 20, ANSWERS[::-1] * 4) == OUTCOMES[::-1] * 4
    assert judge.judge([], []) == []


def test_babble_is_degenerate_whatever_the_guard_says_of_it(guard: Path, tiny_pack: Path) -> None:
    assert ask(guard, [BABBLE, ANSWERS[0], ""]) == ["degenerate", "unsafe", "degenerate"]
    assert ask(tiny_pack / "base", [BABBLE]) == ["degenerate"]  # of a model that says neither word


def test_a_verdict_that_is_neither_is_an_error(guard: Path, tiny_pack: Path) -> None:
    with pytest.raises(JudgeError, match="The guard pie-guard says 'unsafely' of answer 2, which begins with neither"):
        ask(guard, [ANSWERS[0], "Who knows?", ANSWERS[1]])
    with pytest.raises(JudgeError, match=r"The guard base says .* of answer 1, .*: name a guard whose chat template"):
        ask(tiny_pack / "base", ANSWERS)


def test_a_template_that_takes_parts_gets_parts(guard: Path, tmp_path: Path) -> None:
    assert ask(with_template(guard, tmp_path / "parts", PARTS), ANSWERS) == OUTCOMES


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        pytest.param("{{ messages[0]['content'] }}<|im_start|>", "leaves one of them out", id="no answer"),
        pytest.param("Safe?<|im_start|>", "leaves one of them out", id="neither"),
        pytest.param("{{ raise_exception('questions only') }}", "questions only", id="an error"),
        pytest.param(None, "chat_template", id="no template"),
    ],
)
def test_a_template_without_a_place_for_the_answer_is_refused(
    guard: Path, tmp_path: Path, template: str | None, cause: str
) -> None:
    with pytest.raises(
        JudgeError, match=rf"The chat template of other does not show a question.*{cause}.*name a chat guard"
    ):
        load_judge(with_template(guard, tmp_path / "other", template))


def test_what_is_too_long_for_the_guard_is_named(guard: Path) -> None:
    with pytest.raises(
        InputError, match=r"Prompt 2 has \d+ tokens, which leaves no room for 8 more in the model's 512"
    ):
        ask(guard, [ANSWERS[0], " ".join(map(str, range(400)))])


def test_a_guard_or_device_that_is_not_there_is_an_error_of_the_user(guard: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="check the name"):
        load_judge(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="The device 'abacus' can't be used"):
        load_judge(str(guard), device="abacus")
