"""Stopping what is over a limit: in process, in a child process, by a pruner."""
