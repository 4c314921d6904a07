"""Enforce limits: check, prune or interrupt a trial, and record how it ended."""
