"""Trains language models on the text that each policy keeps, and compares them."""
