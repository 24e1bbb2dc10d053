"""Files, names and streams that everything uses."""
