"""Exit statuses of the training command; 130 is what shells report after Ctrl-C."""

GOOD, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
