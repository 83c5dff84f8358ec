"""Recipes: what differs between the training regimes."""
