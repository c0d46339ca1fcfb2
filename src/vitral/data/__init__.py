"""Labelled images: where they come from, their splits, and batches of them."""
