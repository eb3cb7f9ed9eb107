"""What a model does with real texts: which they are, and what each layer reads while it runs them."""
