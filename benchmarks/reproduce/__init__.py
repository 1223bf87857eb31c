"""The papers' tables on MovieLens, run and written down."""
