"""A run's folder: its files, its outcome, what it reports."""
