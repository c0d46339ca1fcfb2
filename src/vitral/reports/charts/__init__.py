"""Charts as inline SVG: deterministic, in the page's colours, each with its numbers in words."""
