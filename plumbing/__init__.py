"""What carries nanoKD: files, command line, tables.  Read it when a file surprises you."""
