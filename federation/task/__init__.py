"""What is learned: models, data, evaluation. torch is imported inside functions, never at module top."""
