"""The recipe over all stages, and what runs them: one by one, from the shell, or for a question to the model."""
