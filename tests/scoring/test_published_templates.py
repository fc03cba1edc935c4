"""Against an independent form: the chat templates of known models as trl ships them for training, with marks around
what the model generates. What is supervised lies within the marks, and what is left of them is the template's own.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import BatchEncoding

from sqsd_filter.corpus.conversation import Message
from sqsd_filter.scoring.chat_encoder import ChatEncoder, Encoded
from tests.scoring.styles import text_of
from tests.scoring.test_tool_calls import TOOLS, calling, reply, result
from tests.tiny import chat, make_tokenizer

TRL = Path(find_spec("trl").origin).parent  # type: ignore[union-attr, arg-type]  # importing it takes seconds
UNFIT = {  # why the two forms can't be compared
    "idefics3_training": "knows content as a list of parts only",
    "llava_next_training": "knows content as a list of parts only",
    "smolvlm_training": "knows content as a list of parts only",
    "deepseek_r1_distill_training": "asks with a thought begun, which it leaves out of every answer",
    "diffusion_gemma_training": "takes the token that the model ends a call with for the tool's",
}
PUBLISHED = {
    path.stem: text
    for path in sorted(TRL.glob("chat_templates/*.jinja"))
    if path.stem not in UNFIT and "endgeneration" in (text := path.read_text(encoding="utf-8"))
}
WORDS = re.compile("ALPHA|BETA|PARIS|CITY|weather")  # of answers and calls
CALL = [*chat("Warm?"), calling({"CITY": "PARIS"}, text="ALPHA.")]
CONVERSATIONS: list[list[Message]] = [
    chat("Q", " ALPHA ALPHA "),
    chat("Q", "ALPHA", "R", "BETA\n"),
    [*chat("Warm?"), calling({"CITY": "PARIS"})],
    CALL,
    [*chat("Warm?"), calling({"CITY": "PARIS"}), result(), reply("BETA")],
    [TOOLS, *chat("Warm?"), calling({"CITY": "PARIS"}), result(), reply("BETA")],
    [*CALL, result(), reply("BETA"), *chat("More?"), calling({"CITY": "ALPHA"}), result(), reply("PARIS")],
]


def test_there_are_published_templates() -> None:
    assert len(PUBLISHED) > 20


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_supervised_is_what_the_marks_of_a_published_template_say(name: str) -> None:
    tokenizer = make_tokenizer(PUBLISHED[name])
    markers = set(re.findall(r"<[|\uff5c][^\s<>'\"]+[|\uff5c]>|<(?:start|end)_of_turn>", PUBLISHED[name]))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(markers | {"<|im_start|>"}), "bos_token": "<s>"})
    encoder = ChatEncoder(tokenizer, max_length=8192)
    compared = 0
    for turns in CONVERSATIONS:
        if encoder.template.calls is None and any("tool_calls" in t for t in turns):
            continue
        (row,) = encoder.encode([turns])
        if not isinstance(row, Encoded):
            assert row.status == "template_error"
            continue
        tools = next((t["content"] for t in turns if t["role"] == "tools"), None)
        whole = tokenizer.apply_chat_template(
            [t for t in turns if t["role"] != "tools"], tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        assert isinstance(whole, BatchEncoding)
        ids, generated = np.array(whole["input_ids"]), np.array(whole["assistant_masks"], dtype=bool)
        if not np.array_equal(ids[: len(row)], row.ids):
            continue  # the last answer follows a generation prompt that the template writes in no answer
        answer = np.zeros_like(generated)
        answer[: len(row)] = row.answer
        assert text_of(encoder, ids[answer & ~generated]) == ""
        assert not WORDS.search(text_of(encoder, ids[generated & ~answer]))
        compared += 1
    assert compared
