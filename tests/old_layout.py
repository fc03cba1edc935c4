"""Outputs in the layout of earlier versions: kept, dropped and errors side by side, the run's own files in sqsd/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.corpora import FOLDERS

NAMES = {  # of today, and those of earlier versions
    "_sqsd/dropped/train-": "data/dropped-",
    "_sqsd/errors/train-": "data/errors-",
    "_sqsd/reasons": "data/reasons",
    "data/train-": "data/kept-",
    "_sqsd/": "sqsd/",
}


def old_names(text: str) -> str:
    """A text in which files have the names that earlier versions gave them."""
    for new, old in NAMES.items():
        text = text.replace(new, old)
    return text


def age(dest: Path, *, finished: bool = True) -> None:
    """Turn an output of today, of rows of the split train, into what an earlier version would have left. If not
    `finished`, it was killed when all rows were written."""
    home = dest / "sqsd"
    report: dict[str, Any] = json.loads((dest / "_sqsd" / "report.json").read_text())
    for file in report["files"]:
        saved = f"{file['config']}/data-{file['path'].rpartition('/train-')[2]}"  # as `save_to_disk` calls it
        file["path"] = _move(dest, file["path"], saved if report["to"] == "arrow" else old_names(file["path"]))
    if report["to"] == "jsonl":
        _move(dest, "_sqsd/reasons.jsonl", "data/reasons.jsonl")
    report["extra_files"] = [old_names(name) for name in report["extra_files"]]
    (dest / "README.md").write_text(old_names((dest / "README.md").read_text()))
    (dest / "_sqsd").rename(home)
    for folder in (home / "dropped", home / "errors", dest / "train"):
        shutil.rmtree(folder, ignore_errors=True)
    if report["to"] == "arrow":
        report["extra_files"] = [name for name in report["extra_files"] if "json" not in name] + _describe(dest)
    (home / "report.json").write_text(json.dumps(report))
    if not finished:
        (home / "report.json").unlink()
        (dest / "README.md").unlink()


def _move(dest: Path, name: str, old: str) -> str:
    (dest / old).parent.mkdir(exist_ok=True)
    (dest / name).rename(dest / old)
    return old


def _describe(dest: Path) -> list[str]:
    """Save the Arrow files of each config as `save_to_disk` does."""
    import datasets

    for config in FOLDERS:
        files = sorted((dest / config).glob("*.arrow"))
        features = datasets.Dataset.from_file(str(files[0])).features
        datasets.DatasetInfo(features=features).write_to_directory(str(dest / config))
        state: dict[str, Any] = {
            "_data_files": [{"filename": file.name} for file in files],
            "_fingerprint": "0" * 16,
            "_split": None,
        }
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        (dest / config / "state.json").write_text(json.dumps(state))
    (dest / "dataset_dict.json").write_text(json.dumps({"splits": list(FOLDERS)}))
    return ["dataset_dict.json", *(f"{config}/{name}.json" for config in FOLDERS for name in ("state", "dataset_info"))]
