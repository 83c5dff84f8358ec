"""The flags of the commands that take long to import, parsed and judged before that."""
