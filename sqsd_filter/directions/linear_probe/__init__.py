"""Linear probes of hidden states: fitted on known rows, unsafe ones and others."""
