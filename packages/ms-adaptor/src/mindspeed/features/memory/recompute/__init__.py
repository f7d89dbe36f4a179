"""What is computed again in backward."""
