"""What runs did: curves, routing health and comparisons."""
