"""The papers' figures, for any checkpoint: `draw_figures` measures, draws and writes them with one page."""
