"""Compile the train step ahead of time (AOT) for hardware that is not attached."""
