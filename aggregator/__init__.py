"""The server: rounds, the door, the fold, the store."""
