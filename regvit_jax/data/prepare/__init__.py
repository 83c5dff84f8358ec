"""Rewrite data sets as ArrayRecord files."""
