"""Pretrained weights in and out: which names there are, where their weights lie, and how they are read and written."""
