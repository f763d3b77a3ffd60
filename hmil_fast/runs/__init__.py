"""Run folders: their files, read and written."""
