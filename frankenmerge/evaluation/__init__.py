"""Whether a model, however it was made, is any good."""
