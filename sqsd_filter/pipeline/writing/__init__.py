"""Output: every row in one file, with a report and a card; a destination is never replaced by half."""
