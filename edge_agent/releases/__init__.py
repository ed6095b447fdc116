"""Follow the aggregator's releases on the device: fetch, test, activate, watch, go back. Importing torch here is a defect."""
