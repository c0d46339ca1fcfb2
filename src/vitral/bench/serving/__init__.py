"""A running server under load: how fast it answers, what it refuses, and whether an answer is missing."""
