"""Differential privacy and secure aggregation. Imports none of the other packages."""
