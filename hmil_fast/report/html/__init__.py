"""Write the report of a run: one HTML file that holds every picture."""
