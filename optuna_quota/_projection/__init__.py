"""Projects what a strategy will use, and the probability that it fits a quota."""
