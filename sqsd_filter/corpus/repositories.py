"""Datasets as `datasets` names them: a repository of the Hub, or a folder laid out like one, with its configurations
and splits. `datasets` finds the data files. Files of a format that `formats` knows are read directly and exactly; all
others are read as `datasets` opens them.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import yaml

from sqsd_filter.corpus.files import HubFile, LocalFile, RemoteFile, SourceFile
from sqsd_filter.corpus.formats import Reader, kind, open_file
from sqsd_filter.corpus.table_formats import DatasetTable, FileTable, Recast
from sqsd_filter.errors import InputError, first_line
from sqsd_filter.storage.hub_errors import hub_errors
from sqsd_filter.storage.layout import RUN_FILE, holds_run, is_beside, own_paths
from sqsd_filter.storage.retries import with_retries

if TYPE_CHECKING:
    from datasets import DatasetBuilder

HUB = "hf://datasets/"
# Below this line our card holds the cards of its sources, so that filtering twice does not nest cards.
MARKER = "<!-- sqsd-filter: below are the cards of the sources -->"
_OURS = ("json", "csv", "parquet", "arrow")  # modules of `datasets` for files that are read directly
_NEUTRAL = ("name", "version", "data_dir", "data_files", "description")  # settings that change no value


@dataclass(frozen=True)
class Repository:
    """A dataset at one commit, or a local folder that is laid out as one."""

    where: str  # org/name, or the folder
    commit: str | None = None
    streaming: bool = False

    @classmethod
    def on_hub(cls, name: str, revision: str | None, *, streaming: bool = False) -> Repository:
        """The dataset org/name at a branch, tag or commit. Raises `InputError` if it can't be read."""
        from huggingface_hub import HfApi

        with hub_errors(name, revision):
            commit = with_retries(lambda: HfApi().dataset_info(name, revision=revision)).sha
        return cls(name, commit, streaming)

    @property
    def spec(self) -> str:
        return f"{HUB}{self.where}@{self.commit}" if self.commit else self.where

    def card(self) -> str | None:
        """The text of its README.md, if it has one."""
        from huggingface_hub.errors import RemoteEntryNotFoundError

        file = LocalFile(Path(self.where) / "README.md")
        try:
            with (HubFile(self.where, self.commit, "README.md") if self.commit else file).open() as opened:
                return opened.read().decode(errors="replace")
        except (FileNotFoundError, RemoteEntryNotFoundError):
            return None

    def original_card(self) -> str | None:
        """The text of its README.md; without our marker where no run of this tool has left its record, since anybody
        can write the marker."""
        text = self.card()
        if text is None or MARKER not in text:
            return text
        own = own_paths(RUN_FILE)
        ours = holds_run(Path(self.where)) if self.commit is None else not set(own).isdisjoint(self.paths())
        return text if ours else text.replace(MARKER, "")

    def file(self, path: str) -> SourceFile:
        """One of its files."""
        if self.commit is None:
            return LocalFile(Path(self.where) / path)
        if self.streaming:
            return RemoteFile(f"{self.spec}/{path}")
        return HubFile(self.where, self.commit, path)

    def paths(self) -> list[str]:
        """The paths of all its files at this commit, sorted."""
        from huggingface_hub import HfApi

        with hub_errors(self.where, self.commit):
            return sorted(
                with_retries(lambda: HfApi().list_repo_files(self.where, revision=self.commit, repo_type="dataset"))
            )

    def readers(self, part: str) -> Iterator[tuple[str, str, Reader]]:
        """Configuration, split and reader of each data file. `part` is "", "config", "split" or "config/split", where
        several splits are joined by +. Raises `InputError` for a part that the dataset does not have."""
        builder, wanted = self._builder(part)
        files = builder.config.data_files or {}
        splits = {str(name): list(paths) for name, paths in files.items()}
        names = wanted.split("+") if wanted else list(splits)
        for name in names:
            if name not in splits:
                raise InputError(f"{self.where} has no split '{name}'; it has {', '.join(splits) or 'none'}.")
        check_splits(self.where, names)
        self._refuse_outsiders(path for name in names for path in splits[name])
        if self.commit is None:
            self._refuse_results(path for name in names for path in splits[name])
        config = str(builder.config.name)
        features = builder.info.features
        if not self._is_ours(builder, [path for name in names for path in splits[name]]):
            yield from ((config, name, reader) for name, reader in self._prepared(config, names))
            return
        for name in names:
            for path in splits[name]:
                reader = open_file(self._data_file(path))
                if isinstance(reader, FileTable) and features is not None:
                    reader = reader if features.arrow_schema.equals(reader.schema, True) else Recast(reader, features)
                yield config, name, reader

    def _refuse_outsiders(self, paths: Iterable[str]) -> None:
        """Raise `InputError` for a data file outside of the dataset, which only its card can name."""
        top = os.path.abspath(self._dataset_path) if self.commit is None else f"{HUB}{self.where}@{self.commit}"
        for path in paths:
            inner = path.rpartition("::")[2]  # of an archive that `datasets` unpacks
            if not PurePosixPath(os.path.normpath(inner)).is_relative_to(os.path.normpath(top)):
                raise _outside(self.where, path)

    def _refuse_results(self, paths: Iterable[str]) -> None:
        """Raise `InputError` if a folder below this one holds the output of an earlier run."""
        top = Path(self.where).resolve()
        for folder in {parent for path in paths for parent in Path(path).parents if top in parent.parents}:
            if holds_run(folder) or is_beside(folder):
                raise InputError(
                    f"{self.where} holds {folder.relative_to(top)}, the output of an earlier run, which would be read "
                    "too: move it away, or name the files to read."
                )

    def _builder(self, part: str) -> tuple[DatasetBuilder, str]:
        """The builder of a configuration, and the splits asked for."""
        from datasets import get_dataset_config_names

        config, _, splits = part.partition("/")
        with hub_errors(self.where, self.commit):
            check_card(self.where, self.card() or "")
            try:
                return self._declared(config), splits
            except ValueError as problem:
                names = with_retries(lambda: get_dataset_config_names(self._dataset_path, revision=self.commit))
                if config in names:
                    raise InputError(
                        f"{self.where} can't be opened ({first_line(problem)}): check its files."
                    ) from problem
                if config and not splits and (default := self._default(names, config)):
                    return default, config
                known = ", ".join(names)
                if config:
                    raise InputError(f"{self.where} has no configuration '{config}'; it has {known}.") from problem
                raise InputError(
                    f"{self.where} has the configurations {known}; name one of them: {self.where}:{names[0]}."
                ) from problem

    @property
    def _dataset_path(self) -> str:
        """The name or path by which `datasets` opens it."""
        return str(Path(self.where).resolve()) if self.commit is None else self.where

    def _load(self, config: str, cache: str | None = None) -> DatasetBuilder:
        """The builder of this configuration, or with "" of the default one. Raises `ValueError` for an unknown one."""
        from datasets import load_dataset_builder

        return with_retries(
            lambda: load_dataset_builder(self._dataset_path, name=config or None, revision=self.commit, cache_dir=cache)
        )

    def _declared(self, config: str) -> DatasetBuilder:
        """The same without the cache: its types are the declared ones, not those that `datasets` inferred and cached
        when it prepared the dataset earlier."""
        with TemporaryDirectory() as empty:
            return self._load(config, empty)

    def _default(self, names: Sequence[str], splits: str) -> DatasetBuilder | None:
        """The builder of the only configuration, or of the default one if it has these splits; else None."""
        try:
            builder = self._declared("")
        except ValueError:  # none of several is the default
            return None
        known = {str(name) for name in builder.config.data_files or ()}
        return builder if len(names) == 1 or known.issuperset(splits.split("+")) else None

    def _is_ours(self, builder: DatasetBuilder, paths: list[str]) -> bool:
        """Does reading these files directly give what `datasets` gives: no settings, no types declared for text?"""
        modules = {
            cls.__module__.rpartition(".")[2] for cls in type(builder).__mro__ if "packaged_modules" in cls.__module__
        }
        settings, default = builder.config, type(builder.config)()
        plain = all(
            getattr(settings, f.name) == getattr(default, f.name)
            for f in dataclasses.fields(settings)
            if f.name not in _NEUTRAL
        )
        kinds = {kind(self._data_file(path)) for path in paths if "::" not in path}
        text = bool(kinds - {".parquet", ".arrow"})
        readable = None not in kinds and not any("::" in path for path in paths)
        return bool(modules & set(_OURS)) and plain and readable and not (text and builder.info.features is not None)

    def _data_file(self, path: str) -> SourceFile:
        if self.commit is not None and path.startswith(HUB):
            return self.file(path.removeprefix(HUB).partition("@")[2].partition("/")[2])
        if "://" in path:
            return RemoteFile(path)
        return LocalFile(os.path.join(self.where, os.path.relpath(path, Path(self.where).resolve())))

    def _prepared(self, config: str, splits: list[str]) -> Iterator[tuple[str, Reader]]:
        """The splits as `datasets` prepares them in its cache."""
        if self.streaming:
            raise InputError(f"{self.where} holds files that only `datasets` can read, whole: leave out --streaming.")
        with hub_errors(self.where, self.commit):
            builder = self._load(config)
            with_retries(builder.download_and_prepare)
            for name in splits:
                yield name, DatasetTable(f"{self.spec}:{config}/{name}", builder.as_dataset(split=name))


def check_card(where: str, card: str) -> None:
    """Raise `InputError` where a card's header can't be read, or names data files outside of the dataset: `datasets`
    would look for them, on the disk and in the network, before it could be asked what it has found."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # older versions load much more with it

    block = REGEX_YAML_BLOCK.match(card)
    try:
        header = yaml.safe_load(block[2]) if block else None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise InputError(
            f"The header of {where}/README.md can't be read ({first_line(problem)}): correct it."
        ) from problem
    configs = header.get("configs") if isinstance(header, dict) else None
    for config in configs if isinstance(configs, list) else []:
        for path in _texts([config.get("data_files"), config.get("data_dir")] if isinstance(config, dict) else []):
            if "://" in path or os.path.isabs(path) or ".." in PurePosixPath(path).parts:
                raise _outside(where, path)


def _texts(value: object) -> Iterator[str]:
    """The strings in a list or dict, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _texts(child)


def _outside(where: str, path: str) -> InputError:
    return InputError(
        f"The card of {where} names {path}, which is outside of the dataset: if you want it read, name it yourself."
    )


def is_split(name: str) -> bool:
    """Does `datasets` accept this name for a split?"""
    return name != "all" and re.fullmatch(r"\w+(\.\w+)*", name) is not None


def check_splits(where: object, names: Iterable[str]) -> None:
    """Raise `InputError` for a split that `datasets` could not load from the output."""
    for name in names:
        if not is_split(name):
            raise InputError(
                f"{where} has a split named {name!r}, which `datasets` can't load: rename it, with letters, digits, _ "
                "and single dots, and not 'all'."
            )


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets` and of the Hub's client: the run reports its progress itself."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            enable_progress_bars()
