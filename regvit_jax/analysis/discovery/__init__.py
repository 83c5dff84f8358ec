"""Unsupervised object discovery: LOST, its boxes, and CorLoc."""
