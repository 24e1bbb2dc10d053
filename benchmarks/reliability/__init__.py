"""Kill, starve and mutate the product, and count what happens: reliability as a figure."""
