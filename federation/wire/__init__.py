"""Bytes on MQTT. Imports neither torch nor any other package of fedge."""
