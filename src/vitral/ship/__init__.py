"""Makes a trained model into something that can be given away: export, the fastest form, a server, a page."""
