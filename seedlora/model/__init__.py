"""The base model: loading, outline, weight files, quantisation, compilation."""
