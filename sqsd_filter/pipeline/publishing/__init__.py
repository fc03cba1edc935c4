"""Where a finished run goes from the disk: a repository of the Hub, or a folder behind a URL."""
