"""Models in the format of Hugging Face's Llama, taken in and given back."""
