"""The chorus command."""
