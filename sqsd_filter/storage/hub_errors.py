"""What the Hub and `datasets` refuse, as one sentence with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqsd_filter.errors import InputError, first_line


@contextmanager
def hub_errors(name: str, revision: str | None = None) -> Iterator[None]:
    """Turns what they raise for a dataset, or a folder of this name, into `InputError`; a missing file goes through."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError, DatasetNotFoundError
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
            f"{name}{at} holds no data files that can be read: put some there, as .jsonl or .parquet, or name another "
            "place."
        ) from problem
    except hub.RevisionNotFoundError as problem:
        raise InputError(f"{name} has no revision '{revision}': name a branch, a tag or a commit.") from problem
    except hub.RepositoryNotFoundError as problem:
        raise _unknown(name) from problem
    except hub.OfflineModeIsEnabled as problem:
        raise InputError(f"{name} can't be fetched, since HF_HUB_OFFLINE is set: unset it.") from problem
    except (InputError, hub.RemoteEntryNotFoundError):
        raise
    # the error class of the HTTP client that huggingface_hub imports, whichever that is
    except (hub.HTTPError, hub.HFValidationError, DatasetGenerationError, OSError, ValueError) as problem:
        status = getattr(getattr(problem, "response", None), "status_code", None)
        if status == 429:
            raise InputError(
                f"The Hub still refuses to give {name} for too many requests: wait a few minutes, and set HF_TOKEN, "
                "which allows more of them."
            ) from problem
        remote = "the network, the dataset and, for a private one, the token in HF_TOKEN"
        raise InputError(
            f"{name}{at} can't be read ({first_line(problem.__cause__ or problem)}): check "
            f"{'its files' if not at and Path(name).is_dir() else remote}."
        ) from problem


def _unknown(name: str) -> InputError:
    return InputError(
        f"There is no file or folder '{name}' here, and no such dataset on the Hub that this token may read: check the "
        "name, and for a private dataset the token in HF_TOKEN."
    )
