"""One typed function per command: what the command line and `import hmil_fast` call."""
