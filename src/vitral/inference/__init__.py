"""A trained model with its preprocessing and labels, as one object; and its features."""
