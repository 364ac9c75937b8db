"""What a run leaves behind: rows, metrics, heat maps and the report."""
