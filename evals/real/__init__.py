"""The whole pipeline on language models that others trained: `python -m evals.real`."""
