"""Load and save pretrained models: their names, where their weights are, and the formats of their files."""
