"""The layouts of other libraries: how each is recognized, read and written."""
