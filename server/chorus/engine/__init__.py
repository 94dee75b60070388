"""The engine: what runs when, in which rows, on which pages."""
