"""Lightning callbacks: they say when; the arithmetic is in seedlora."""
