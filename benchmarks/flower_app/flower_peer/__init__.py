"""The work of ``benchmarks/peer_flwr.py`` as a Flower app: the same model, images and loop as fedge's agents."""
