"""The Transformer: its settings, layers, training loss, text generation, and the door to Hugging Face's layouts."""
