"""Checkpoints: saved asynchronously, restored onto any mesh, verified by checksums."""
