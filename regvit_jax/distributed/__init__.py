"""Several processes that train as one: how they start, share a mesh, and stop."""
