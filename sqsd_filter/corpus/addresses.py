"""The sources that a user may name, and the readers for them.

in.jsonl  'corpus/*.parquet'  folder/  saved/            files, globs, folders for load_dataset or load_from_disk
folder:config/split  saved:split                         such folders with a configuration, splits (a+b) or both
org/name  org/name@revision:config/split                 a dataset of the Hub
s3://bucket/part-*.jsonl  hf://datasets/org/name@rev/*   files behind URLs
-                                                        JSON Lines on standard input
a Dataset, DatasetDict, IterableDataset ...              from Python
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote, unquote

from sqsd_filter.corpus.encodings import cure
from sqsd_filter.corpus.files import LocalFile, RemoteFile, as_os_errors, unreadable
from sqsd_filter.corpus.formats import Reader, kind, open_file
from sqsd_filter.corpus.repositories import HUB, Repository, check_splits, is_split, quiet_datasets
from sqsd_filter.corpus.spool import stored
from sqsd_filter.corpus.table_formats import DatasetTable, SavedDataset
from sqsd_filter.corpus.text_formats import JsonLines, TextFile
from sqsd_filter.errors import InputError, UsageError
from sqsd_filter.storage.folder import connect
from sqsd_filter.storage.layout import DEFAULT, kept_part
from sqsd_filter.storage.retries import with_retries
from sqsd_filter.storage.secrets import check_address

SPLIT = "train"  # of rows that have no split of their own
STDIN = "-"
_UNQUOTED = "/=,+@()"  # characters that stay readable in a URL
_ON_HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^:@]+))?(:(?P<part>.+))?")


class HubDataset(TypedDict):
    """A dataset of the Hub as it was read: `revision` is its commit; `config` and `split` are None for single files."""

    id: str
    revision: str | None
    config: str | None
    split: str | None


@dataclass(frozen=True)
class Source:
    """One reader, and where its rows come from."""

    reader: Reader
    spec: str | None  # opens it again at the same revision; "" if nothing can, None if the spec before does
    split: str = SPLIT
    dataset: HubDataset | None = None
    card: tuple[str, str] | None = None  # the name of its dataset and the text of the dataset's README.md
    roots: tuple[str, ...] = ()  # the files, folders and URLs outside the Hub that it reads


class Opener:
    """Opens sources. Rows that had to be stored for this (standard input, iterables) are deleted by `close`."""

    def __init__(self, *, streaming: bool = False) -> None:
        """With `streaming`, files of the Hub are fetched again at each pass and never kept in its cache."""
        self._streaming = streaming
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def open(self, given: Sequence[Any]) -> list[Source]:
        """The sources in order, globs sorted. Raises `InputError` for one that is missing or can't be read, and
        `UsageError` for standard input that is closed or given twice."""
        if sum(str(item) == STDIN for item in given if isinstance(item, str | Path)) > 1:
            raise UsageError("Standard input can be read only once: give - once.")
        try:
            with quiet_datasets():
                return [source for item in given for source in self._one(item)]
        except OSError as problem:
            raise unreadable(problem.filename, problem) from problem

    def _one(self, given: object) -> Iterator[Source]:
        if not isinstance(given, str | Path):
            yield from self._object(given)
        elif given == "":
            raise InputError("A source is an empty string; name a file, a folder or a dataset (is a variable unset?).")
        elif str(given) == STDIN:
            yield Source(self._stdin(), "")
        elif "://" in str(given):
            check_address(str(given))
            yield from self._url(str(given))
        else:
            yield from self._path(str(given))

    def _path(self, text: str) -> Iterator[Source]:
        if local := _split_part(text):
            yield from self._local(*local)
        elif glob.has_magic(text):
            for path in expand([text]):
                yield from self._local(Path(path), "")
        elif (named := _ON_HUB.fullmatch(text)) and kind(LocalFile(text)) is None:
            yield from self._on_hub(**named.groupdict())
        else:
            raise InputError(f"{text} does not exist; check the path. A dataset of the Hub is written org/name.")

    def _local(self, path: Path, part: str) -> Iterator[Source]:
        kept = kept_part(path)
        if not path.is_dir():
            yield Source(open_file(LocalFile(path)), str(path), roots=(str(path),))
        elif kept is not None and not part:
            raise InputError(
                f"{path} holds the output of an earlier run: name what to read, as '{path}:{kept}' for the kept rows."
            )
        elif (path / "state.json").exists():
            if part:
                raise InputError(f"{path} is a single saved split: leave out ':{part}'.")
            yield Source(SavedDataset(path), str(path), card=_card(path), roots=(str(path),))
        elif (path / "dataset_dict.json").exists() and kept != DEFAULT:
            for split in _saved_splits(path, part):
                own = path / split
                yield Source(SavedDataset(own), str(own), split, card=_card(path), roots=(str(path),))
        else:
            yield from _of_repository(Repository(str(path)), part)

    def _on_hub(self, name: str, revision: str | None, part: str | None) -> Iterator[Source]:
        return _of_repository(Repository.on_hub(name, revision, streaming=self._streaming), part or "")

    def _url(self, url: str) -> Iterator[Source]:
        if not url.startswith(HUB):
            for file in _expand_url(url):
                yield Source(open_file(file), file.name, roots=(_root(file.name),))
            return
        first, _, rest = url.removeprefix(HUB).partition("/")
        second, _, path = rest.partition("/") if ":" not in rest.partition("/")[0] else (rest, "", "")
        named = _ON_HUB.fullmatch(f"{first}/{unquote(second)}")
        if named is None:
            raise InputError(f"{url} names no dataset: write {HUB}org/name.")
        if not path:
            yield from self._on_hub(**named.groupdict())
            return
        repository = Repository.on_hub(named["name"], named["revision"], streaming=self._streaming)
        about = HubDataset(id=repository.where, revision=repository.commit, config=None, split=None)
        card = _named(repository.where, repository.original_card())
        for name in _matching(path, repository.paths(), url):
            yield Source(open_file(repository.file(name)), f"{repository.spec}/{name}", dataset=about, card=card)

    def _stdin(self) -> JsonLines:
        if sys.stdin is None:
            raise UsageError("Standard input is closed: pipe JSON Lines into it, or name a file instead of -.")
        path = self._temporary_folder() / "stdin.jsonl"
        with path.open("wb") as sink:
            shutil.copyfileobj(sys.stdin.buffer, sink, 1 << 20)
        return JsonLines(LocalFile(path, STDIN))

    def _temporary_folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sqsd-filter-")))

    def _object(self, given: object, name: str = "the dataset") -> Iterator[Source]:
        from datasets import Dataset, IterableDataset

        if isinstance(given, Mapping):
            check_splits("The dataset", map(str, given))
            for split, dataset in given.items():
                sources = self._object(dataset, f"the split {split}")
                yield from (Source(source.reader, "", str(split)) for source in sources)
            return
        if not isinstance(given, Dataset | IterableDataset):
            raise InputError(f"A {type(given).__name__} can't be filtered: give paths, or a dataset of `datasets`.")
        split = str(given.split) if given.split is not None else SPLIT
        rows = (
            given if isinstance(given, Dataset) else stored(given, folder=self._temporary_folder())
        )  # to be read several times
        yield Source(DatasetTable(name, rows), "", split if is_split(split) else SPLIT)


def _of_repository(repository: Repository, part: str) -> Iterator[Source]:
    card, last = None, ""
    for number, (config, split, reader) in enumerate(repository.readers(part)):
        if number == 0:
            card = _named(repository.where, repository.original_card())
        about = HubDataset(id=repository.where, revision=repository.commit, config=config, split=split)
        of_hub = repository.commit is not None
        spec = f"{repository.spec}:{config}/{split}"
        roots = () if of_hub else (repository.where,)
        yield Source(reader, None if spec == last else spec, split, about if of_hub else None, card, roots)
        last = spec


def _root(url: str) -> str:
    """The path of a file:// URL; any other as it is."""
    from pyarrow import fs

    filesystem, path = connect(url)
    return path if isinstance(filesystem, fs.LocalFileSystem) else url


def _split_part(text: str) -> tuple[Path, str] | None:
    """The local file or folder of this name, and the part of it that is named after a colon; None if neither exists."""
    if Path(text).exists():
        return Path(text), ""
    folder, _, part = text.rpartition(":")
    return (Path(folder), part) if folder and Path(folder).is_dir() else None


def expand(paths: Sequence[Any]) -> list[Any]:
    """The sources with each local glob replaced by the files that match, sorted. Raises `InputError` if none does."""
    expanded: list[Any] = []
    for path in paths:
        text = str(path) if isinstance(path, str | Path) else ""
        if not glob.has_magic(text) or "://" in text or _split_part(text):
            expanded.append(path)
            continue
        matching = sorted(_glob(text))
        if not matching:
            raise InputError(f"No file matches {text}; check the pattern.")
        expanded += matching
    return expanded


def _glob(pattern: str) -> set[str]:
    """The paths that match, where ** stands for any number of folders. Links to folders are followed, except to one
    that the link lies in: that would never end."""
    head, stars, tail = f"/{pattern}{'/*' * f'/{pattern}'.endswith('/**')}".partition("/**/")
    if not stars:
        return set(glob.glob(pattern, recursive=True))
    head, found = head.removeprefix("/"), set[str]()
    tops = [top for top in glob.glob(head) if Path(top).is_dir()] if head else [""]
    for folder in [inner for top in tops for inner in _folders(top)]:
        found |= _glob(f"{glob.escape(folder)}/{tail}" if folder else tail)
    return found


def _folders(top: str) -> Iterator[str]:
    """A folder and all in it, without hidden ones."""
    yield top
    with os.scandir(top or ".") as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        path = os.path.join(top, name)
        if not (os.path.islink(path) and Path(path).absolute().is_relative_to(os.path.realpath(path))):
            yield from _folders(path)


def _expand_url(url: str) -> list[RemoteFile]:
    """The files that a URL names, sorted; its path may have * and [...].

    URLs of pyarrow's own kinds are quoted and may have a query; those of fsspec packages are taken literally.
    """
    from pyarrow import fs

    path, mark, query = url.partition("?")
    filesystem, root = connect(_base(path) + mark + query)
    quoted = not isinstance(filesystem, fs.PyFileSystem)
    if mark and not quoted and not url.startswith("http"):
        path, mark, query = url, "", ""
        filesystem, root = connect(_base(path))
    base = _base(path)
    if base == path:
        return [RemoteFile(url, url, root)]
    folder = base + mark + query
    try:
        with as_os_errors():
            infos = with_retries(lambda: filesystem.get_file_info(fs.FileSelector(root, recursive=True)))
    except OSError as problem:
        raise InputError(
            f"{base} can't be listed ({problem.strerror}): check the address and your rights."
        ) from problem
    listed = {i.path.removeprefix(root).lstrip("/"): i.path for i in infos if i.type == fs.FileType.File}
    pattern = path[len(base) + 1 :]
    if quoted:
        glob_pattern = re.sub(r"(%[0-9A-Fa-f]{2})+", lambda escaped: glob.escape(unquote(escaped[0])), pattern)
    else:
        glob_pattern = pattern.replace("?", "[?]")
    names = [pattern] if pattern in listed and not quoted else _matching(glob_pattern, sorted(listed), url)
    return [
        RemoteFile(f"{base}/{quote(name, safe=_UNQUOTED) if quoted else name}{mark}{query}", folder, listed[name])
        for name in names
    ]


def _base(path: str) -> str:
    """The folder above the first part with * or [; the whole path if no part has one."""
    start, *magic = re.split(r"[*\[]", path, maxsplit=1)
    return start.rpartition("/")[0] if magic else path


def _matching(pattern: str, names: Sequence[str], asked: str) -> list[str]:
    from fsspec.utils import glob_translate

    regex = re.compile(glob_translate(pattern))
    matching = [name for name in names if name == pattern or regex.match(name)]
    if not matching:
        raise InputError(f"No file matches {asked}; check the address.")
    return matching


def _saved_splits(folder: Path, part: str) -> list[str]:
    path = folder / "dataset_dict.json"
    try:
        names = [str(name) for name in json.loads(path.read_bytes())["splits"]]
        first = names[0]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} names no splits; save the dataset again.") from error
    wanted = part.split("+") if part else names
    if unknown := [name for name in wanted if name not in names]:
        raise InputError(f"{folder} has no split '{unknown[0]}'; it has {', '.join(names)}: {folder}:{first}.")
    check_splits(folder, wanted)
    return wanted


def _card(folder: Path) -> tuple[str, str] | None:
    return _named(folder, Repository(str(folder)).original_card() if (folder / "README.md").is_file() else None)


def _named(name: object, text: str | None) -> tuple[str, str] | None:
    return None if text is None else (str(name), text)


def peek(sources: Sequence[Source], n: int = 1000) -> list[dict[str, Any]]:
    """About `n` readable rows: the first rows of each source, or of `n` sources spread over the list.

    Raises `InputError` where there are rows, but none is readable.
    """
    rows, problem = look(sources, n)
    if problem and not rows:
        raise InputError(f"No readable row was found in the input. The first is {problem}.")
    return rows


def look(sources: Sequence[Source], n: int = 1000) -> tuple[list[dict[str, Any]], str]:
    """The rows that `peek` gives, and what is wrong with the first other row ("" where there was none)."""
    sources = sources[:: max(1, -(-len(sources) // n))]
    share = -(-n // max(1, len(sources)))
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for source in sources:
        if isinstance(source.reader, TextFile):
            rows += islice(_readable(source.reader, problems), share)
        else:
            rows += source.reader.glimpse(share)
    return rows[:n], next(iter(problems), "")


def _readable(reader: TextFile, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a text file that can be read. The first problem of others is added to `problems`."""
    for _, line, value, problem, _ in reader.records():
        if value is not None:
            yield value
        elif not problems:
            problems.append(f"{reader.name}, line {line}: {problem}{cure(problem)}")
