"""How the batches of a dataset are read: by one row format for all of them, with a warning about what is not read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sqsd_filter.corpus.unread import Unread

if TYPE_CHECKING:
    from sqsd_filter.corpus.conversation import Message
    from sqsd_filter.corpus.row_formats import Columns, RowFormat
    from sqsd_filter.scoring.map_step import Batch

log = logging.getLogger(__name__)


class BatchReader:
    """Reads batches by `form`, or else by the format that the names of their columns suggest."""

    def __init__(self, columns: Columns, form: RowFormat | None) -> None:
        self._columns, self._form = columns, form
        self._unread: dict[frozenset[str], Unread] = {}  # by the names of a batch's columns

    def conversations(self, rows: Batch) -> tuple[list[list[Message]], dict[int, str]]:
        """The conversation of each row, which is empty where there is none, and by row number the reasons for that.

        Raises `InputError` where no format fits.
        """
        names = frozenset(rows.names)
        if names not in self._unread:
            form = self._form or self._columns.choose(rows, of_batch=True)
            self._unread[names] = Unread(form, self._columns.strict)
        unread = self._unread[names]
        read = rows.conversations(unread.form)
        known = len(unread.found)
        for k, row in enumerate(rows, 1):
            unread.see(row, "a batch", k)
        for note in unread.notes()[known:]:
            log.warning("%s", note)
        return read
