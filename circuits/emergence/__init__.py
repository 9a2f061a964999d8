"""When in training does a head's role appear: checkpoint series, onsets, and clamps held while training."""
