"""What the answers of one pass over held-out images tell: by class, how sure, which labels, beside others."""
