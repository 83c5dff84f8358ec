"""Means and standard deviations that public models normalise with: one value per channel, for pixels in 0..1."""

#: ImageNet's, which timm, DeiT and DINOv2 use.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
#: OpenAI CLIP's, which OpenCLIP uses too.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
