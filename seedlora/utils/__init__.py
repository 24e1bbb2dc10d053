"""Helpers that everything uses: files, hub folders, random streams, spelling, library internals."""
