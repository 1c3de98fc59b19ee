"""From a recipe to a checkpoint on disk."""
