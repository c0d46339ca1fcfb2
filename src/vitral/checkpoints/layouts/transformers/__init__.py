"""transformers' hub folders: a row of `families` for each ``model_type``, a file for each style of keys.

``config.json`` tells almost everything. Keys are those on disk, which transformers keeps while its classes
are renamed.
"""
