"""What a run learned: the report of training, and the analysis of a trained rater."""
