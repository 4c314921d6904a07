"""Utilization models: the correlation of hyperparameters to what trials used."""
