"""Utilization models: how hyperparameters drive the usage of a finished study's trials."""
