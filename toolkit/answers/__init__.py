"""What outputs mean, how good they are, and what is reported of them."""
