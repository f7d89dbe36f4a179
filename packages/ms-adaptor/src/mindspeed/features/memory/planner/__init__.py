"""A budget of bytes: the first training step is measured, planned, and kept to."""
