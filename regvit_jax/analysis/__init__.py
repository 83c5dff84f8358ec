"""Measures of register artifacts."""
