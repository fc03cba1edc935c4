"""sqsd-filter: a safety-risk column on every row of an instruction corpus."""
