"""Models in Hugging Face's format, taken in and given back."""
