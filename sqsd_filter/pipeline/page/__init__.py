"""The page of a run: what it shows of the rows is noted while they are written, the rest is read of what runs left."""
