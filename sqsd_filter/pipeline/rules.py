"""The rules that combine several packs' scores: each takes a figure of a row's ranks."""

CONSENSUS = {
    "mean-rank": "mean of the row's ranks by these packs, as a share of the rows that all of them could score",
    "max": "largest of the row's ranks by these packs, as a share of the rows that all of them could score",
}
