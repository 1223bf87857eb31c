"""Norms, gates and dropout: operations that see one row at a time."""
