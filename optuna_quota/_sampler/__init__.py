"""QuotaSampler: admits trials, starts and settles their metering, around any sampler."""
