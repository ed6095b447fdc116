"""Run a model on the device with onnxruntime and numpy. Importing torch here is a defect."""
