"""From alignments to recipes. The planner sees scores, never weights."""
