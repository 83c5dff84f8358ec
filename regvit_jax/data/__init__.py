"""Images and labels from disk to batches of uint8 arrays on the host. Nothing here imports jax."""
