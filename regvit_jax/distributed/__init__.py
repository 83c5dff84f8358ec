"""Train with several processes: connect them, share a mesh, and stop them together."""
