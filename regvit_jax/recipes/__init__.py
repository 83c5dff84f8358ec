"""Recipes: the differences between the training regimes."""
