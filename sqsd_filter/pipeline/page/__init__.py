"""The page of a run: notes on its rows are taken while they are written, the rest comes from its report."""
