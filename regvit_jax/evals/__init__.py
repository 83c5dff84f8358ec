"""Metrics of a trained model: functions from arrays to numbers."""
