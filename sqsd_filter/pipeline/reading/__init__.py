"""What comes in: files, folders and datasets of any kind as one sequence of rows."""
