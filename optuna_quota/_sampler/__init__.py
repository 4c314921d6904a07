"""QuotaSampler: wraps a sampler and admits studies, trials and points within a quota."""
