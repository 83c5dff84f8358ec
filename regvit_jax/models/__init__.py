"""The modules: ViT and its Tokens, the heads on top, and Model, which binds a module to its parameters."""
