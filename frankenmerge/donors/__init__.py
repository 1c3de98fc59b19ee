"""A model on disk: its config, its tensors' names and places, its tokenizer. Imports no torch."""
