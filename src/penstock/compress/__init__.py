"""Making compressed models; what runs them is below."""
