"""Where a token stands: tables added to tokens, and what attention knows of two tokens' places."""
