"""What touches the model being trained: packing, attention, log-probs, the DeepSpeed engine and its ranks."""
