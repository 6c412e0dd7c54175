"""What outputs mean, how good they are, and what is told of them."""
