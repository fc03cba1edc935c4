"""How many rows the loaders of LLaMA-Factory and axolotl read from outputs. Both pin other versions than this project,
so this runs in an environment of theirs and imports nothing else:

    python -m tests.pipeline.readers outputs         # here: the outputs of 200 rows, 185 of them kept
    python tests/pipeline/trainers.py outputs        # there, with `pip install llamafactory`, or `axolotl`
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def by_llamafactory(path: Path) -> int:
    """As for a dataset_info.json with `file_name`: one file, or all files of a folder."""
    args, loader, parser = (import_module(f"llamafactory.{name}") for name in ("hparams", "data.loader", "data.parser"))
    attr = parser.DatasetAttr("file", dataset_name=path.name, prompt="text", query=None, response=None)
    data = args.DataArguments(dataset_dir=str(path.parent), overwrite_cache=True)
    with tempfile.TemporaryDirectory() as cache:
        model = args.ModelArguments(model_name_or_path="none", cache_dir=cache)
        training = import_module("transformers").Seq2SeqTrainingArguments(output_dir=cache, use_cpu=True)
        return len(vars(loader)["_load_single_dataset"](attr, model, data, training))


def by_axolotl(path: Path) -> int:
    """As for `datasets: - path: ...` in its configuration."""
    shared, names = import_module("axolotl.utils.data.shared"), import_module("axolotl.utils.dict")
    rows = shared.load_dataset_with_config(names.DictDefault({"path": str(path), "split": "train"}), False)
    return len(rows["train"] if isinstance(rows, dict) else rows)


LOADERS = {"llamafactory": by_llamafactory, "axolotl": by_axolotl}


def main(outputs: Path) -> None:
    """Print a row of the table of docs/output.md for each output and loader that is installed."""
    for name, load in LOADERS.items():
        if not find_spec(name):
            continue
        print(f"{name} {version(name)}, datasets {version('datasets')}")
        for path in sorted(p for p in outputs.glob("*/out*") if not p.name.endswith(".sqsd")):
            for place in (path, path / "data") if path.is_dir() else (path,):
                try:
                    read = str(load(place))
                except Exception as problem:
                    read = f"{type(problem).__name__}: {problem}".partition("\n")[0]
                print(f"| {path.parent.name} | {name} | {place.relative_to(path.parent)} | {read} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
