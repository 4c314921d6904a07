"""Footprints: the expected usage of a point, stated by the user or learned from trials."""
