"""QuotaSampler: any sampler inside a quota."""
