"""The report of a run: one HTML file, with every picture inside."""
