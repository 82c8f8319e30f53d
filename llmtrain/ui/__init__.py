"""What a person sees of an endpoint."""
