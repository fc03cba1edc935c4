"""Tool calls are supervised in the words of the template that shows them, and never anything beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqsd_filter.corpus.conversation import Message, RowError, is_supervised
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from tests.scoring.styles import QWEN3, STYLES, Style, encode, status, supervised, text_of, texts
from tests.tiny import CHATML, chat, make_tokenizer

_ENDS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
HERMES = (  # text and any number of calls; tools in a system turn
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + _ENDS
)
LLAMA31 = (  # one call instead of text, arguments under another name; tools in the first user turn
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "\' + m.tool_calls[0].function.name + '
    "'\", \"parameters\": ' + m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{% if tools and loop.first %}{{ tools | tojson(indent=4) + '\n\n' }}{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # no generation prompt, strict about ids and turns; tools before the last user turn
    "{% set ns = namespace(users=0, seen=0, asks=true) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.users = ns.users + 1 %}{% endif %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != ns.asks %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% set ns.asks = not ns.asks %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.seen = ns.seen + 1 %}{% if tools and ns.seen == ns.users %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}"
    "{% for call in m.tool_calls %}{% if not call.id %}{{ raise_exception('a call needs an id') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{{ ', ' if not loop.last else ']' + eos_token }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + {'content': m.content, 'call_id': m.tool_call_id} | tojson + "
    "'[/TOOL_RESULTS]' }}{% else %}{{ m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (  # arguments as JSON text
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<|call|>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```<|end_call|>' }}{% endfor %}"
    "{% if m.role == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHANNELS = (  # a call ends with a token of its own, and its result repeats its name
    "{% set last = namespace(name='') %}{% for m in messages %}{{ '<|start|>' }}{% if m.role == 'tool' %}"
    "{{ 'functions.' + last.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% elif m.tool_calls %}{% set last.name = m.tool_calls[0].function.name %}"
    "{{ 'assistant to=functions.' + last.name + '<|message|>' }}"
    "{{ m.tool_calls[0].function.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ m.role + '<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
TAGS = (  # arguments one by one, and no generation prompt
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<call=' + call.function.name + '>' }}{% for name, value in call.function.arguments | items %}"
    "{{ '<' + name + '>' + value | tojson + '</' + name + '>' }}{% endfor %}{{ '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MARKERS = ("<|call|>", "<|end_call|>", "<|end|>", "<|start|>", "<|message|>", "<|channel|>")


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def functions(turn: Message) -> list[dict[str, Any]]:
    return [call["function"] for call in turn["tool_calls"]]


# A style, and how it writes a turn with calls, said once more in Python
TOOL_STYLES: dict[str, tuple[Style, Callable[[Message], str]]] = {
    "hermes": (
        Style(HERMES),
        lambda turn: (
            "\n".join(
                [turn["content"]] * bool(turn["content"])
                + [f"<tool_call>\n{as_json(f)}\n</tool_call>" for f in functions(turn)]
            )
            + "<|im_end|>"
        ),
    ),
    "llama3.1": (
        Style(LLAMA31, HEADERS, bos="<|begin|>", eos="<|eot_id|>", end="<|eot_id|>", trims=True),
        lambda turn: "".join(
            f'{{"name": "{f["name"]}", "parameters": {as_json(f["arguments"])}}}<|eot_id|>' for f in functions(turn)
        ),
    ),
    "mistral": (
        Style(MISTRAL, ("[TOOL_CALLS]", "[/INST]"), bos="<s>", eos="</s>", end="</s>", trims=True),
        lambda turn: (
            "[TOOL_CALLS] " + as_json([{**call["function"], "id": call["id"]} for call in turn["tool_calls"]]) + "</s>"
        ),
    ),
    "deepseek": (
        Style(DEEPSEEK, ("<|assistant|>", *MARKERS), end="<|end|>"),
        lambda turn: (
            turn["content"]
            + "".join(
                f"<|call|>{f['name']}\n```json\n{as_json(f['arguments'])}\n```<|end_call|>" for f in functions(turn)
            )
            + "<|end|>"
        ),
    ),
    "channels": (
        Style(CHANNELS, MARKERS, end="<|end|>"),
        lambda turn: "".join(
            f" to=functions.{f['name']}<|message|>{as_json(f['arguments'])}<|call|>" for f in functions(turn)
        ),
    ),
    "tags": (
        Style(TAGS),
        lambda turn: (
            turn["content"]
            + "".join(
                f"<call={f['name']}>"
                + "".join(f"<{name}>{as_json(value)}</{name}>" for name, value in f["arguments"].items())
                + "</call>"
                for f in functions(turn)
            )
            + "<|im_end|>"
        ),
    ),
}
every_tool_style = pytest.mark.parametrize("name", TOOL_STYLES)
ENCODERS = {name: style.encoder(max_length=8192) for name, (style, _) in TOOL_STYLES.items()}
TOOLS: Message = {"role": "tools", "content": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}


def calling(*arguments: dict[str, Any], text: str = "", **more: Any) -> Message:
    """An assistant's turn that calls `weather` once for each of the arguments."""
    function = [{"name": "weather", "arguments": a} for a in arguments]
    calls = [{"id": f"call{n:05}", "type": "function", "function": f} for n, f in enumerate(function)]
    return {"role": "assistant", "content": text, "tool_calls": calls, **more}


def result(text: str = "sunny") -> Message:
    return {"role": "tool", "content": text, "tool_call_id": "call00000", "name": "weather"}


def reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def expected(name: str, turns: list[Message]) -> list[str]:
    style, shown = TOOL_STYLES[name]
    return [
        shown(turn)
        if "tool_calls" in turn
        else (turn["content"].strip() if style.trims else turn["content"]) + style.end
        for turn in turns
        if is_supervised(turn)
    ]


ROUND = [*chat("Is it warm?"), calling({"city": "Rome"}), result(), reply("Yes.")]
ROUNDS = [
    *ROUND,
    *chat("And in Oslo?"),
    calling({"city": "Oslo", "days": [1, 2]}),
    result("snow"),
    reply("No."),
]


@every_tool_style
@pytest.mark.parametrize("tools", [[], [TOOLS]], ids=["no-tools", "tools"])
@pytest.mark.parametrize("turns", [ROUND[:2], ROUND[:3], ROUND, ROUNDS[:6], ROUNDS], ids=lambda turns: f"{len(turns)}")
def test_calls_and_answers_are_supervised_as_the_template_writes_them(
    name: str, tools: list[Message], turns: list[Message]
) -> None:
    assert supervised(ENCODERS[name], [*tools, *turns]) == expected(name, turns)


@every_tool_style
def test_the_text_that_stands_before_a_call_counts_where_the_template_shows_it(name: str) -> None:
    turns = [*chat("Warm?"), calling({"city": "Rome"}, text="Let me look."), result(), reply("Yes.")]
    assert supervised(ENCODERS[name], turns) == expected(name, turns)
    assert supervised(ENCODERS[name], turns[:2]) == expected(name, turns[:2])


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek", "tags"])
def test_several_calls_of_one_turn_are_one_answer(name: str) -> None:
    turns = [*chat("Warm?"), calling({"city": "Rome"}, {}, {"city": "Oslo"}), result(), result(), reply("Yes.")]
    assert supervised(ENCODERS[name], turns) == expected(name, turns)


def test_calls_that_the_template_refuses_are_a_template_error() -> None:
    turns = [*chat("Warm?"), calling({"city": "Rome"}, {"city": "Oslo"})]
    (found,) = ENCODERS["llama3.1"].encode([turns])
    assert isinstance(found, RowError)
    assert (found.status, "one call at once" in found.detail) == (
        "template_error",
        True,
    )
    turns[1]["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    assert status(ENCODERS["mistral"], turns) == "template_error"  # it wants ids


@every_tool_style
def test_a_call_with_weight_0_is_prompt(name: str) -> None:
    turns = [*chat("Warm?"), calling({"city": "Rome"}, weight=0), result(), reply("Yes.")]
    assert supervised(ENCODERS[name], turns) == expected(name, turns) == ["Yes." + TOOL_STYLES[name][0].end]
    assert "Rome" in text_of(ENCODERS[name], encode(ENCODERS[name], turns).ids)
    assert status(ENCODERS[name], turns[:3]) == "no_answer"


@pytest.mark.parametrize("name", ["hermes", "deepseek", "channels"])
def test_the_tools_are_part_of_the_prompt_where_the_template_shows_them(name: str) -> None:
    row = encode(ENCODERS[name], [TOOLS, *ROUND])
    shows = "parameters" in text_of(ENCODERS[name], row.ids[~row.answer])
    assert shows == ("tools" in TOOL_STYLES[name][0].template)


@pytest.mark.parametrize("name", ["chatml", "llama3", "generation-markers"])
def test_where_the_template_knows_no_calls_only_text_is_supervised(name: str) -> None:
    encoder, end = STYLES[name].encoder(), STYLES[name].end
    assert supervised(encoder, ROUND) == ["Yes." + end]
    assert status(encoder, ROUND[:3]) == "no_answer"
    turns = [*chat("Warm?"), calling({"city": "Rome"}, text="Let me look."), result(), reply("Yes.")]
    assert supervised(encoder, turns) == ["Let me look." + end, "Yes." + end]


def test_a_template_that_wants_a_call_without_text_gets_none() -> None:
    template = CHATML.replace(
        "message['content']",
        "(message.content if message.content is defined else 'calls ' + "
        "message.tool_calls[0].function.arguments | tojson)",
    )
    encoder = ChatEncoder(make_tokenizer(template))
    assert supervised(encoder, ROUND) == ['calls {"city": "Rome"}<|im_end|>', "Yes.<|im_end|>"]


def test_a_template_that_prints_pythons_words_gets_json_text() -> None:
    template = HERMES.replace("call.function | tojson", "call.function.arguments ~ ''")
    encoder = ChatEncoder(make_tokenizer(template))
    assert supervised(encoder, ROUND[:2]) == ['<tool_call>\n{"city": "Rome"}\n</tool_call><|im_end|>']


def test_the_words_of_a_call_begin_where_they_part_from_a_plain_answers() -> None:
    """No generation prompt says where, and the turn's head is another one too."""
    encoder = ChatEncoder(
        make_tokenizer(TAGS.replace("m.role + '\n'", "m.role + (' calls' if m.tool_calls else '\n')"))
    )
    assert supervised(encoder, ROUND) == [
        ' calls<call=weather><city>"Rome"</city></call><|im_end|>',
        "Yes.<|im_end|>",
    ]


def test_where_no_token_ends_a_turn_the_last_call_ends_with_the_end_of_text() -> None:
    encoder = ChatEncoder(make_tokenizer(TAGS.replace("<|im_start|>", "### ").replace("<|im_end|>", "")))
    call = '<call=weather><city>"Rome"</city></call>'
    assert supervised(encoder, ROUND[:2]) == [call + "<|im_end|>"]
    assert supervised(encoder, ROUND) == [call, "Yes.<|im_end|>"]


def test_a_call_that_ends_in_its_own_way_ends_with_its_last_special_token() -> None:
    template = MISTRAL.replace("']' + eos_token", "']<|end_call|>' + eos_token").replace("trim +", "trim + ' ' +")
    encoder = replace(TOOL_STYLES["mistral"][0], template=template, special=("<|end_call|>",)).encoder()
    assert supervised(encoder, ROUND)[0].endswith("]<|end_call|></s>")
    assert supervised(encoder, ROUND[:2]) == supervised(encoder, ROUND)[:1]


def test_the_empty_thinking_block_before_a_call_is_prompt_and_reasoning_is_answer() -> None:
    template = QWEN3.replace("{{ '<|im_end|>\n' }}{% endif %}{% endfor %}", "{% for call in m.tool_calls or [] %}"
                             "{{ '<tool_call>' + call.function | tojson }}{% endfor %}"
                             "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}")  # fmt: skip
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>'
    encoder = ChatEncoder(make_tokenizer(template))
    assert supervised(encoder, ROUND[:2]) == [call]
    thinking = [*chat("Warm?"), calling({"city": "Rome"}, text="<think>\nhm\n</think>\n\n")]
    assert supervised(encoder, thinking) == ["<think>\nhm\n</think>\n\n" + call]
    followed = [*thinking, result(), reply("Yes."), *chat("Sure?", "Quite.")]
    assert supervised(encoder, followed) == [call, "Yes.<|im_end|>", "Quite.<|im_end|>"]  # it drops old reasoning


@pytest.mark.parametrize(
    ("here", "instead"),
    [
        ("in m.tool_calls or []", "in (m.tool_calls if m.tool_calls and loop.last else [])"),
        ("'\n<tool_call>\n'", "('\n<tool_call>\n' if m is sameas(messages[-1]) else '\n<old_call>\n')"),
        ("'\n</tool_call>'", "('\n</tool_call>' if m is sameas(messages[-1]) else '\n</old_call>')"),
        ("for m in messages", "for m in messages[-1:]"),
    ],
    ids=["not-at-all", "opened-in-another-way", "closed-in-another-way", "turn-left-out"],
)
def test_a_template_that_shows_old_calls_in_another_way_is_never_mislabelled(here: str, instead: str) -> None:
    encoder = ChatEncoder(make_tokenizer(HERMES.replace(here, instead)))
    assert encoder.template.calls
    assert here in HERMES
    assert status(encoder, ROUND) == "template_error"


def test_a_call_that_nothing_asks_for_is_a_bad_row() -> None:
    assert status(ENCODERS["hermes"], [TOOLS, calling({})]) == "bad_row"
    assert status(ENCODERS["hermes"], [calling({}), *chat("Warm?", "Yes.")]) == "bad_row"


def test_calls_in_a_row_are_answers_each() -> None:
    turns = [*chat("Warm?"), calling({"city": "Rome"}), calling({"city": "Oslo"}), result(), reply("Yes.")]
    for name in ("hermes", "llama3.1", "deepseek", "tags"):
        assert "".join(supervised(ENCODERS[name], turns)) == "".join(expected(name, turns))


# ---------------------------------------------------------------------------------------------- any conversation at all

values = st.recursive(texts | st.integers() | st.booleans(), lambda inner: st.lists(inner, max_size=2), max_leaves=3)
arguments = st.dictionaries(st.sampled_from(["city", "days", "assistant", "<|im_end|>"]) | texts, values, max_size=3)
rounds = st.builds(
    lambda ask, calls, said: [
        *chat(ask),
        *(turn for text, a, weight, found in calls for turn in (calling(a, text=text, **weight), result(found))),
        reply(said),
    ],
    texts,
    st.lists(st.tuples(texts, arguments, st.sampled_from([{}, {}, {"weight": 0}]), texts), max_size=2),
    texts,
)


@every_tool_style
@settings(max_examples=80, deadline=None)
@given(
    turns=st.lists(rounds, min_size=1, max_size=3).map(lambda parts: [turn for part in parts for turn in part]),
    tools=st.sampled_from([[], [TOOLS]]),
    cut=st.integers(0, 3),
)
def test_the_supervised_tokens_are_the_calls_and_answers(
    name: str, turns: list[Message], tools: list[Message], cut: int
) -> None:
    turns = turns[: max(2, len(turns) - cut)]
    wanted = expected(name, turns)
    (found,) = ENCODERS[name].encode([[*tools, *turns]])
    if not wanted:
        assert isinstance(found, RowError)
        assert found.status == "no_answer"
        return
    assert isinstance(found, Encoded), found.detail
    assert text_of(ENCODERS[name], found.ids[found.answer]) == "".join(wanted)
