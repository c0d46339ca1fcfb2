"""The page on which a model is asked: of a server, or as one file that runs the model itself."""
