"""What goes into a forward pass and what comes out: batches, edits, caches, row statistics."""
