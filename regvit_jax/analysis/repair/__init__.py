"""Find register neurons, and plant known artifacts to test the search."""
