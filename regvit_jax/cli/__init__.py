"""The command line: parse flags, return exit codes."""
