"""Pictures of what the other stages found."""
