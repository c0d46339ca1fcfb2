"""The ranges of numbers that can be meant, (smallest, largest); beyond them a zero too many was typed.

Plain numbers, for the command line reads them before anything slow is imported.
"""

SEED = (0, 2**32 - 1)  # what NumPy and scikit-learn take
PIXELS = (1, 8192)  # of an image's side
BATCH = (1, 2**20)
WORKERS = (0, 1024)
IMAGES = (1, 10**9)  # that a set is limited to
LABELS = (1, 10**6)  # to print of an image
ROUNDS = (1, 1000)
LAYER = (-1000, 999)
