"""What the commands print: tables and maps of text."""
