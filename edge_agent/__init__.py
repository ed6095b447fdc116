"""The agent on a device: it trains, uploads, and runs the model."""
