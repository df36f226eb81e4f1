"""Sources, exact Bayes predictors, evaluation and launch scripts."""
