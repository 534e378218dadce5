"""Models from elsewhere and for elsewhere: references to weights, Hugging Face's formats, generation."""
