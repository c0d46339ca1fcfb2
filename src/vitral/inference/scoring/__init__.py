"""Scoring without end: any number of images to parquet parts, restarted where it stopped, here or on Ray."""
