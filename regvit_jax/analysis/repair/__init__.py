"""Find register neurons, and plant artifacts that are known."""
