"""What one stage hands on to the next; each kind is written and read by one module."""
