"""Does a score show which rows strip a model's safety? Fine-tunes on ranked rows and asks harmful prompts."""
