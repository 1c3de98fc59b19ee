"""The feature engine: which inputs excite which neurons, and how far two donors agree about it."""
