"""What carries nanoKD: files, command line, tables.  Nobody needs it to understand distillation; read it
when a file surprises you.
"""
