"""Analyses of trained networks and of exact predictors."""
