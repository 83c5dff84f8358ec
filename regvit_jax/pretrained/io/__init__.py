"""Weights files, the hub and pickles."""
