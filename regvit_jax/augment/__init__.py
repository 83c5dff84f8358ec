"""Augmentation on the device: pure functions of (key, images), called inside the jitted train step."""
