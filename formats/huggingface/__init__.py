"""What several containers share with the checkpoint: config, safetensors, model card."""
