"""What a run is told: the settings, what is chosen from the data, and the papers' recipes as TOML."""
