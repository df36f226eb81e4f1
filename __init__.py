"""Memory-based meta-learning on non-stationary distributions.

Networks are trained on log loss to predict piecewise-stationary sequences, and
held against the exact Bayes predictors for them (Genewein et al., 2023,
arXiv:2302.03067).
"""
