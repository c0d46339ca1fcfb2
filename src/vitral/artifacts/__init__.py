"""A model that was exported: its files, the check that they answer as it did, and the engines that run them.

Nothing here imports torch.
"""
