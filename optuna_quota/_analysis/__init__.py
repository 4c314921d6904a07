"""Analysis of a study: correlations, advice, a summary, and replays under other limits."""
