"""Training after pruning: LoRA for language models, SGD for image networks."""
