"""A recipe on a tiny model with its data files, with and without a choice among its states; the files of a pack."""

from __future__ import annotations

from pathlib import Path

from tests.corpora import make_rows, write_jsonl

RECIPE = """
name = "tiny"
base_model = "{model}"
dtype = "float32"
max_length = 64
[lora]
r = 2
alpha = 4
[adapters.initial]
method = "sft"
data = "benign.jsonl"
prompt = "instruction"
answer = "output"
licence = "CC0-1.0"
rows = 16
learning_rate = 1e-3
batch_size = 4
save_steps = 2
take_step = 2
[adapters.danger]
method = "sft"
data = "answers.jsonl"
prompt = "instruction"
answer = "output"
where = {{ bad = true }}
epochs = {epochs}
learning_rate = 1e-3
batch_size = 4
device_batch_size = 2
save_steps = 2
[adapters.safety]
method = "dpo"
data = "pairs.jsonl"
prompt = "prompt"
chosen = "good"
rejected = "bad"
learning_rate = 1e-3
batch_size = 4
save_steps = 2
[[probes]]
name = "danger"
weight = 1.0
direction = "danger"
state = "initial"
[[probes]]
name = "safety"
weight = -1.0
direction = "safety"
state = "safety"
state_scaling = 1.0
"""


def write_recipe(folder: Path, model: Path, epochs: int = 2) -> Path:
    rows = make_rows(24)
    write_jsonl(folder / "benign.jsonl", rows)
    write_jsonl(folder / "answers.jsonl", [{**row, "bad": k % 2 == 0} for k, row in enumerate(rows)])
    pairs = [{"prompt": r["instruction"], "good": r["output"], "bad": "No idea."} for r in rows]
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "recipe.toml").write_text(RECIPE.format(model=model, epochs=epochs))
    return folder / "recipe.toml"


STATES = """
[states]
data = "answers.jsonl"
prompt = "instruction"
answer = "output"
positive = { bad = true }
rows = 20
"""


def with_choice(recipe: Path, states: str = STATES) -> Path:
    """The recipe with the state chosen among its checkpoints, which are kept."""
    text = "keep_checkpoints = true\n" + recipe.read_text()
    chosen = recipe.with_name("choice.toml")
    chosen.write_text(text.replace("take_step = 2", 'take_step = "sensitive"') + states)
    return chosen


def files(pack: Path) -> dict[str, bytes]:
    return {str(p.relative_to(pack)): p.read_bytes() for p in sorted(pack.rglob("*")) if p.is_file()}
