"""Files that are whole or not there, on a disk or behind a URL; locks; retries of what may pass."""
