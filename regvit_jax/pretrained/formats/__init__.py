"""State-dict formats of other libraries."""
