"""Errors of the Hub and of `datasets`, as one sentence with cause and fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqsd_filter.errors import InputError, SQSDError, first_line


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors about a dataset, or a folder of this name, into `InputError`. A missing file stays what it is."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub import errors as hub

    at = f" at {revision}" if revision else ""
    try:
        yield
    except (hub.GatedRepoError, DatasetNotFoundError) as problem:
        if "gated" not in str(problem):
            raise _unknown(name) from problem
        raise InputError(
            f"{name} is gated: accept its terms on its page of the Hub, and give your token in HF_TOKEN or by "
            "'hf auth login'."
        ) from problem
    except (EmptyDatasetError, DataFilesNotFoundError) as problem:
        raise InputError(
            f"{name}{at} holds no data files that can be read: add some, as .jsonl or .parquet, or name another "
            "dataset."
        ) from problem
    except hub.RevisionNotFoundError as problem:
        raise InputError(f"{name} has no revision '{revision}': name a branch, a tag or a commit.") from problem
    except hub.RepositoryNotFoundError as problem:
        raise _unknown(name) from problem
    except hub.OfflineModeIsEnabled as problem:
        raise InputError(f"{name} can't be fetched, since HF_HUB_OFFLINE is set: unset it.") from problem
    except (SQSDError, hub.RemoteEntryNotFoundError):
        raise
    except Exception as problem:  # `datasets` raises what files and cards of strangers lead it to
        status = getattr(getattr(problem, "response", None), "status_code", None)
        if status == 429:
            raise InputError(
                f"The Hub still refuses {name} because of too many requests: wait a few minutes, and set HF_TOKEN, "
                "which allows more requests."
            ) from problem
        remote = "the network, the dataset and, for a private one, the token in HF_TOKEN"
        raise InputError(
            f"{name}{at} can't be read ({first_line(problem.__cause__ or problem).rstrip('.')}): check "
            f"{'its files' if not at and Path(name).is_dir() else remote}."
        ) from problem


def _unknown(name: str) -> InputError:
    return InputError(
        f"There is no file or folder '{name}' here, and no such dataset on the Hub that this token may read: check the "
        "name, and for a private dataset the token in HF_TOKEN."
    )
