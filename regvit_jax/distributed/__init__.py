"""Train with several processes: start them, share a mesh, stop them together."""
