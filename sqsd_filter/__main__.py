"""`python -m sqsd_filter`."""

from sqsd_filter.cli.main import run

run()
