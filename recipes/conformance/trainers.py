"""What trainers make of the conversations in rows.jsonl: the token ids and the labels of their own preprocessing.

The trainers pin other versions than this project, so each runs in an environment of its own, with nothing but itself:

    pip install trl && python recipes/conformance/trainers.py trl                     # SFTTrainer, DPOTrainer
    pip install llamafactory && python recipes/conformance/trainers.py llamafactory
    pip install axolotl && python recipes/conformance/trainers.py axolotl

Each writes golden/<trainer>.json. `python recipes/conformance/trainers.py tokenizer` makes tokenizer.json from the text
of the rows; the golden files hold only for the rows, tokenizer and templates that they were made with. compare.py, in
this project's environment, says where the trainers learn the tokens that are scored here, and where they don't.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
TEMPLATES = {  # name -> the file's special tokens: beginning of the text, end of a turn
    "chatml": (None, "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<end_of_turn>"),  # refuses system prompts
}
SPECIAL = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end")]
SPECIAL += [f"<|{name}|>" for name in ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id")]
SPECIAL += ["<bos>", "<start_of_turn>", "<end_of_turn>"]
MAX_LENGTH = 1024  # tokens, where a row names no other limit
IGNORED = -100  # the label of a token that is not learned

Row = dict[str, Any]
Learned = tuple[list[int], list[int]]  # ids and labels
Results = dict[str, Learned | str]  # by the answer: what is learned, or why the trainer learns nothing


def read_rows() -> list[Row]:
    """The rows: each with its `name`, the `form` that tells how a trainer is configured for it, and perhaps a
    `max_length` in tokens."""
    return [json.loads(line) for line in (HERE / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def make_tokenizer(template: str) -> Any:  # noqa: ANN401  # transformers is not typed
    """The tokenizer with this template. Like the models' own ones, it writes the beginning of a text."""
    processors = import_module("tokenizers.processors")
    begin, end = TEMPLATES[template]
    named = {"eos_token": end, "pad_token": SPECIAL[0]} | ({"bos_token": begin} if begin else {})
    tokenizer = import_module("transformers").PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), **named
    )
    if begin:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
        )
    tokenizer.chat_template = (HERE / f"{template}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return tokenizer


def write_tokenizer() -> None:
    """A byte-level BPE tokenizer of the rows' text."""
    tokenizers = import_module("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [HERE.joinpath(f"{template}.jinja").read_text(encoding="utf-8") for template in TEMPLATES]
    texts += [json.dumps(row, ensure_ascii=False).replace("\\n", "\n") for row in read_rows()]
    tokenizer.train_from_iterator(texts, trainer)
    (HERE / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------- TRL


def by_trl(tokenizer: Any, row: Row) -> Results:  # noqa: ANN401
    """As SFTTrainer and DPOTrainer prepare their datasets: the assistant's turns are learned, or the completion."""
    trl, datasets = import_module("trl"), import_module("datasets")
    values, limit = row["row"], row.get("max_length", MAX_LENGTH)
    common = {"max_length": limit, "report_to": [], "use_cpu": True, "bf16": False}
    given = {"model": _tiny_model(tokenizer), "processing_class": tokenizer}
    given["train_dataset"] = datasets.Dataset.from_list([values])
    if row["form"] == "preference":
        trainer = trl.DPOTrainer(args=trl.DPOConfig("out", **common), ref_model=_tiny_model(tokenizer), **given)
        if not len(trainer.train_dataset):
            return dict.fromkeys(answers_of(row), "dropped")
        batch = trainer.data_collator([trainer.train_dataset[0]])
        learned = [
            _learned(*(batch[name][k][batch["attention_mask"][k].bool()] for name in ("input_ids", "completion_mask")))
            for k in range(2)
        ]
        return dict(zip(answers_of(row), learned, strict=True))
    settings = {"assistant_only_loss": True} if "prompt" not in values else {}
    trainer = trl.SFTTrainer(args=trl.SFTConfig("out", **common, **settings), **given)
    rows = trainer.train_dataset
    return {"answer": (rows[0]["input_ids"], rows[0]["labels"]) if len(rows) else "dropped"}


def _learned(ids: Any, mask: Any) -> Learned:  # noqa: ANN401  # tensors
    return ids.tolist(), [k if learned else IGNORED for k, learned in zip(ids.tolist(), mask.tolist(), strict=True)]


def _tiny_model(tokenizer: Any) -> Any:  # noqa: ANN401
    """A model that no one trains: a trainer can't be had without one."""
    transformers = import_module("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes))


# ---------------------------------------------------------------------------------------------- LLaMA-Factory

# Its own templates, which write a conversation as the files here do
LLAMAFACTORY_TEMPLATES = {"chatml": "qwen3_nothink", "llama3": "llama3", "gemma": "gemma"}
_ROLES = ("user", "assistant", "observation", "function", "system")
_TAGS = {  # the keys of a turn, and the names of its roles
    name: dict(zip(("role_tag", "content_tag", *(f"{role}_tag" for role in _ROLES)), values.split(), strict=True))
    for name, values in {
        "openai": "role content user assistant tool function_call system",
        "sharegpt": "from value human gpt observation function_call system",
        "user": "from value user assistant observation function_call system",
    }.items()
}
_PLAIN = ("system", "history", "tools", "chosen", "rejected")  # columns that have these names in the rows too


def dataset_info(row: Row) -> dict[str, Any]:
    """How dataset_info.json describes the row."""
    values = row["row"]
    columns = {name: name for name in _PLAIN if name in values}
    described: dict[str, Any] = {"file_name": f"{row['name']}.json", "columns": columns}
    if "chosen" in columns:
        described["ranking"] = True
    if "label" in values:
        columns["kto_tag"] = "label"
    turns = next((name for name in ("conversations", "messages") if name in values), None)
    if turns:
        columns["messages"] = turns
        called = any("tool_calls" in turn for turn in values[turns])  # only its form `openai` reads them
        tags = "openai" if turns == "messages" else "user" if values[turns][0]["from"] == "user" else "sharegpt"
        return described | {"formatting": "openai" if called else "sharegpt", "tags": _TAGS[tags]}
    names = {
        "prompt": ("instruction", "prompt", "query"),
        "query": ("input",),
        "response": ("output", "completion", "response"),
    }
    for name, usual in names.items():
        if column := next((column for column in usual if column in values), None):
            columns[name] = column
    return described | {"formatting": "alpaca"}


def by_llamafactory(tokenizer: Any, row: Row) -> Results:  # noqa: ANN401
    """As its `get_dataset` does for one dataset of dataset_info.json."""
    hparams, data, transformers = (
        import_module(name) for name in ("llamafactory.hparams", "llamafactory.data", "transformers")
    )
    info = dataset_info(row)
    template = next(name for name, (_, end) in TEMPLATES.items() if end == tokenizer.eos_token)
    stage = "rm" if info.get("ranking") else "kto" if "label" in row["row"] else "sft"
    Path("dataset_info.json").write_text(json.dumps({row["name"]: info}))
    Path(info["file_name"]).write_text(json.dumps([row["row"]]))
    args = hparams.DataArguments(
        template=LLAMAFACTORY_TEMPLATES[template],
        dataset=row["name"],
        dataset_dir=".",
        cutoff_len=row.get("max_length", MAX_LENGTH),
        overwrite_cache=True,
    )
    made = data.get_template_and_fix_tokenizer(tokenizer, args)
    training = transformers.Seq2SeqTrainingArguments(output_dir="out", use_cpu=True, report_to=[])
    model = hparams.ModelArguments(model_name_or_path="none", cache_dir="cache")
    rows = data.get_dataset(made, model, args, training, stage=stage, tokenizer=tokenizer)["train_dataset"]
    names = {name: "" if name == "answer" else f"{name}_" for name in answers_of(row)}
    if not len(rows) or (stage == "kto" and not rows[0]["kto_tags"]):
        return dict.fromkeys(names, "unwanted" if len(rows) else "dropped")
    return {name: (rows[0][f"{start}input_ids"], rows[0][f"{start}labels"]) for name, start in names.items()}


# ---------------------------------------------------------------------------------------------- axolotl


def by_axolotl(tokenizer: Any, row: Row) -> Results:  # noqa: ANN401
    """As for a dataset of `type: chat_template`; `message_field_training` is the mark that the row's turns have."""
    names, wrappers, utils = (
        import_module(f"axolotl.utils.{name}") for name in ("dict", "data.wrappers", "data.utils")
    )
    datasets = import_module("datasets")
    values, limit = row["row"], row.get("max_length", MAX_LENGTH)
    column = "conversations" if "conversations" in values else "messages"
    marks = {key for turn in values[column] for key in turn}
    described: dict[str, Any] = {"path": "rows", "type": "chat_template", "field_messages": column}
    if column == "conversations":
        described["message_property_mappings"] = {"role": "from", "content": "value"}
    if mark := next((key for key in ("train", "weight") if key in marks), None):
        described["message_field_training"] = mark
    if "train_detail" in marks:
        described["message_field_training_detail"] = "train_detail"
    config = names.DictDefault({"sequence_len": limit, "train_on_inputs": False, "min_sample_len": 2})
    settings = names.DictDefault({**described, "roles_to_train": ["assistant"], "train_on_eos": "turn"})
    made, _ = wrappers.get_dataset_wrapper(
        settings, tokenizer, config, "chat_template", datasets.Dataset.from_list([values])
    )
    rows = utils.handle_long_seq_in_dataset(made, limit, config)
    return {"answer": (rows[0]["input_ids"], rows[0]["labels"]) if len(rows) else "dropped"}


# ---------------------------------------------------------------------------------------------- all of them

TRAINERS: dict[str, Callable[[Any, Row], Results]] = {
    "trl": by_trl,
    "llamafactory": by_llamafactory,
    "axolotl": by_axolotl,
}
PACKAGES = ("transformers", "tokenizers", "datasets")  # whose versions matter beside the trainer's own


def takes(trainer: str, template: str, row: Row) -> bool:
    """Is this form meant for the trainer? What it only refuses is left out."""
    form, values = row["form"], row["row"]
    if template == "gemma" and "weather" in json.dumps(values):  # it knows no tools
        return False
    if trainer == "axolotl":
        return form in ("messages", "conversations")
    if trainer == "trl":
        return form in ("messages", "conversations", "prompt-completion") or (
            form == "preference" and "instruction" not in values and "conversations" not in values
        )
    if template == "llama3" and "tools" in values:  # it writes the day's date beside the tools of Llama 3
        return False
    turned = any(isinstance(values.get(name), list) for name in ("prompt", "chosen", "completion"))
    return not turned  # an OpenAI-like prompt and its answer are two columns nowhere


def answers_of(row: Row) -> tuple[str, ...]:
    return ("chosen", "rejected") if row["form"] == "preference" else ("answer",)


def results_of(trainer: str, template: str, rows: Sequence[Row]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """By a row's name, what its answers have: `ids`, with the ranges of tokens that are `learned`, or the reason why
    nothing is."""
    for row in rows:
        if not takes(trainer, template, row):
            continue
        try:
            results = TRAINERS[trainer](make_tokenizer(template), row)
        except Exception as problem:  # what a trainer refuses, it may refuse in any way
            print(f"{trainer} {template} {row['name']}: {problem!r}"[:300], file=sys.stderr)
            results = dict.fromkeys(answers_of(row), f"refused ({type(problem).__name__})")
        for answer, result in results.items():
            name = row["name"] if answer == "answer" else f"{row['name']}:{answer}"
            if isinstance(result, str):
                yield name, {"nothing": result}
            else:
                ids, labels = (list(map(int, values)) for values in result)
                learned = learned_ranges(ids, labels)
                yield name, {"ids": ids, "learned": learned} if learned else {"nothing": "no label"}


def learned_ranges(ids: Sequence[int], labels: Sequence[int]) -> list[list[int]]:
    """The ranges [start, stop) of tokens that have a label. Raises `ValueError` for a label that is not the token."""
    if len(ids) != len(labels) or any(label not in (IGNORED, k) for k, label in zip(ids, labels, strict=True)):
        raise ValueError("the labels are not those of the tokens")
    ranges: list[list[int]] = []
    for position, label in enumerate(labels):
        if label != IGNORED:
            if ranges and ranges[-1][1] == position:
                ranges[-1][1] += 1
            else:
                ranges.append([position, position + 1])
    return ranges


def digest() -> str:
    """Of all that a golden file depends on beside the trainer."""
    files = ("rows.jsonl", "tokenizer.json", *(f"{template}.jinja" for template in TEMPLATES))
    return hashlib.blake2b(b"".join((HERE / name).read_bytes() for name in files), digest_size=8).hexdigest()


def main(trainer: str) -> None:
    """Write golden/<trainer>.json, a line for each result."""
    versions = {name: version(name) for name in (trainer, *PACKAGES)}
    rows = read_rows()
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        results = {template: dict(results_of(trainer, template, rows)) for template in TEMPLATES}
    lines = [f'"versions": {json.dumps(versions)}', f'"inputs": "{digest()}"']
    for template, made in results.items():
        each = (f"{json.dumps(name)}: {json.dumps(result, separators=(',', ':'))}" for name, result in made.items())
        lines.append(f'"{template}": {{\n' + ",\n".join(each) + "\n}")
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{trainer}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer() if sys.argv[1:] == ["tokenizer"] else main(*sys.argv[1:])
