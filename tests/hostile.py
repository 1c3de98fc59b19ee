"""What hostile tests share."""

EVIL = "a\x1b]0;owned\x07\x1b[2J\u202e\r[/b][red]\udc80"
"""A name that would change a terminal's title, clear it and reverse its text."""


def stack(*models: object, **keys) -> dict:
    """A recipe of four blocks of each model."""
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(model), "layer_range": [0, 4]}]} for model in models],
    } | keys
