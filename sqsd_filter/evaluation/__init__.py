"""Does a score tell which rows strip a model's safety? Models are trained on its windows and asked harmful prompts."""
