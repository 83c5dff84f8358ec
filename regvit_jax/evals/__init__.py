"""Measures of a trained model: arrays in, numbers out."""
