"""From text to batches: reading, splitting, tokenizing, packing; and the demo corpus."""
