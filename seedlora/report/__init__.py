"""The report of a run: what its folder says, as data, as sentences, as figures, as a page."""
