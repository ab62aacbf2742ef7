"""The recipe with the configs of all stages, the execution of stages, and the trained model's inference."""
