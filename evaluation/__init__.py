"""Do models train better on what a rater keeps? Policies compared like for like."""
