"""What people read at the end of a run: tables, curves, result files."""
