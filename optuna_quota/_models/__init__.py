"""Models of what a trial uses: the online footprint and the utilization models."""
