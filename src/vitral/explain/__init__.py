"""See inside a model: attention, attribution, how far to believe them, and the paper's figures."""
