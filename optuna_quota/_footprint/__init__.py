"""Models of what a trial uses, learned while the study runs."""
