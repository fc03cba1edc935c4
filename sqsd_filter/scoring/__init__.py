"""One row in, its danger, safety and risk out."""
