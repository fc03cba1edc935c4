"""Publishing a finished run from the disk: to a repository of the Hub, or to a folder behind a URL."""
