"""What long runs need around them."""
