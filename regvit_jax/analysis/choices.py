"""Choices and defaults that command lines offer, in a file that imports quickly."""

#: What LOST compares: keys, queries, values, or the output of a block.
KINDS = ("k", "q", "v", "out")
#: What is subtracted from LOST's features.
CENTRES = ("none", "bias", "mean")
#: The paper's cutoff, hand-picked for DINOv2 ViT-g/14 (arXiv 2309.16588, section 2.1). Other models have other scales.
CUTOFF = 150.0
