"""A corpus in, the same corpus without its riskiest rows out."""
