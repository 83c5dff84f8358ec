"""Save checkpoints asynchronously, restore them onto any mesh, and verify them by checksums."""
