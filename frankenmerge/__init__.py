"""Find out which blocks of which language models fit together, then splice them."""

__version__ = "0.1.0"
