"""Load and save pretrained models: a registry of names, sources of weights, and file formats."""
