"""Fields that the package ships: NAME.safetensors with the tensors, NAME.json with settings, digest and card."""
