"""The paper: embedding, attention, encoder, the whole model, its variants and its cost."""
