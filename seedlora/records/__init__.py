"""Store what a run does as JSON: for each file the type of its content, one reader and one writer.

``docs/run_folder.md`` lists the files and their keys; a test holds it to these types.
"""
