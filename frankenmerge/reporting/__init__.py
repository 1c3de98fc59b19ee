"""Pages and figures of the results of the other stages."""
