"""What joins stages: plans that are measured, calibrated and damped."""
