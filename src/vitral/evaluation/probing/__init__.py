"""What a model's features are worth: a linear probe and weighted nearest neighbours."""
