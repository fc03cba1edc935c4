"""Why a row has no score: the statuses, and the exception that carries one with its explanation."""

from __future__ import annotations

SCORED = "scored"
NO_ANSWER = "no_answer"
UNWANTED = "unwanted"  # the row's label says that its answer is not to be learned
PROMPT_TOO_LONG = "prompt_too_long"
NONFINITE = "nonfinite"
BAD_JSON = "bad_json"
BAD_ROW = "bad_row"  # the columns exist but hold no conversation
TEMPLATE_ERROR = "template_error"  # the model's chat template refuses this conversation


class RowError(Exception):
    """This row can't be scored: `status` is one of the constants above, `detail` explains it to the user."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
