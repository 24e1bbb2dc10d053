"""Updates of weights and their algebra, from the factors."""
