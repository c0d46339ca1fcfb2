"""Seeing inside: attention, attribution, how far to believe it, and the papers' figures."""
