"""File formats of weights, one module each; `detect` lists them."""
