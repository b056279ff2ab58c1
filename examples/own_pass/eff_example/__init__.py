"""Hold one pass and one attention kernel that live outside effcompile."""
