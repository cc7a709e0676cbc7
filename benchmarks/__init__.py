"""Side-by-side runs against peers and sanity baselines; rows are kept as JSON and shown as a table."""
