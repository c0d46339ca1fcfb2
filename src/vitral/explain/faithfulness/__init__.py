"""How far to believe a map: what happens to the score when the patches that it names are taken away."""
