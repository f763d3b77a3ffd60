"""One process: slides in, features in the store."""
