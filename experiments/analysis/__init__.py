"""What is asked of trained networks and of exact predictors."""
