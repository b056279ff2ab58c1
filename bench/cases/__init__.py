"""Hold the cases, one a file: a new file with a `Case` in it is a new case."""
